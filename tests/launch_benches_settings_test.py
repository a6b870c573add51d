"""Configs as benchmarks change them: keys by flag, levels by mode."""

import pytest

from nestax.launch.benches import settings
from nestax.models.config import ModelConfig


def test_changes_reach_the_config():
  changes = ['model.D=64', 'model.cms.periods=(8, 16)', 'optimizer=m3']
  config = settings.load('hope_135m', changes)
  assert config.model.D == 64 and config.optimizer == 'm3'
  assert config.model.cms.periods == (8, 16)


@pytest.mark.parametrize(
  'change,words',
  [
    ('model.D', 'key=value'),
    ('model.depth=3', "no key 'model.depth'"),
    ('model.D.E=3', "no key 'model.D.E'"),
    ('model.D=wide', 'model.D is a int, such as 768'),
  ],
)
def test_a_change_that_cannot_be_is_refused_in_words(change, words):
  with pytest.raises(settings.SettingError, match=words):
    settings.load('hope_135m', [change])


def test_levels_learn_as_the_mode_says():
  cfg = ModelConfig(N=4)
  assert settings.with_levels(cfg, 'frozen', 'all').stream is None
  full = settings.with_levels(cfg, 'full', 'last_quarter')
  assert full.adapting == (3,) and full.stream.differentiate == 'full'
  first = settings.with_levels(full, 'first_order', 'all')
  assert first.adapting == (3,), 'the blocks that the config names stay'
  assert first.stream.differentiate == 'first_order'


def test_a_mode_that_is_none_is_refused_in_words():
  with pytest.raises(settings.SettingError, match='--levels=half: one of'):
    settings.with_levels(ModelConfig(), 'half', 'all')


def test_a_transformer_is_only_frozen():
  cfg = ModelConfig(family='transformer')
  assert settings.modes(cfg, ['full', 'frozen']) == ('frozen',)


def test_a_config_may_take_a_word():
  assert settings.load('retnet:135m').name == 'retnet_135m'
  assert settings.load('retnet', ['model.D=64']).model.D == 64
