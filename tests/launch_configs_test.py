"""Every packaged config: complete, valid, and of the size in its name."""

import importlib
import pathlib

import pytest
from absl import flags
from ml_collections import config_flags

from nestax.launch import config_parsing, configs
from nestax.launch.configs import common
from nestax.models import language_model
from nestax.models.config import ModelConfig
from nestax.models.families import FAMILIES

FOLDER = pathlib.Path(configs.__file__).parent
NAMES = sorted({p.stem for p in FOLDER.glob('*.py')} - common.NO_CONFIGS)
SIZED = [name for name in NAMES if name in FAMILIES]
SIZES = {
  '30m': 30e6,
  '135m': 135e6,
  '340m': 340e6,
  '760m': 760e6,
  '1_3b': 1.3e9,
}


def load(name, *size):
  module = importlib.import_module(f'nestax.launch.configs.{name}')
  return module.get_config(*size)


@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_valid_and_carries_its_own_name(name):
  config = load(name)
  common.check(config)
  ModelConfig.from_dict(config.model)
  assert config.name == (f'{name}_30m' if name in SIZED else name)
  assert config.is_locked


def assert_within_3_percent(config, size):
  count = language_model.parameter_count(ModelConfig.from_dict(config.model))
  print(f'{config.name}: {count:,}')
  assert abs(count / SIZES[size] - 1) < 0.03, f'{count:,}'


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('family', ['hope', 'transformer'])
def test_parameter_count_is_within_3_percent_of_the_name(family, size):
  config = load(f'{family}_{size}')
  assert config.model.family == family
  assert_within_3_percent(config, size)


def test_every_family_is_to_be_had_at_every_size():
  assert {'hope', 'transformer', 'hope_attention', *SIZED} == set(FAMILIES)


@pytest.mark.parametrize(
  'size',
  [
    pytest.param(size, marks=() if size == '340m' else pytest.mark.slow)
    for size in SIZES
  ],
)
@pytest.mark.parametrize('family', SIZED)
def test_a_family_has_the_parameters_of_the_transformer(family, size):
  config = load(family, size)
  assert (config.name, config.model.family) == (f'{family}_{size}', family)
  assert_within_3_percent(config, size)
  there = load(f'transformer_{size}')
  for key in ('train', 'opt', 'data'):
    assert config[key] == there[key]


def test_a_command_line_names_a_family_and_its_size(tmp_path):
  def parse(word):
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file('config', flag_values=values)
    config_parsing.parse_flags(['prog', f'--config={word}'], values)
    return holder.value.name

  assert parse('retnet:340m') == 'retnet_340m'
  assert parse('retnet') == 'retnet_30m'
  mine = tmp_path / 'mine.py'
  mine.write_text((FOLDER / 'retnet.py').read_text())
  assert parse(f'{mine}:135m') == 'retnet_135m'
  with pytest.raises(config_parsing.FlagsError, match='retnet:2m.*30m, 135m'):
    parse('retnet:2m')
  with pytest.raises(config_parsing.FlagsError, match="'retnot:340m'.*retnet"):
    parse('retnot:340m')


def test_the_best_is_kept_of_checkpoints_that_are_evaluated():
  config = common.defaults()
  config.checkpoint.update({'every': 40, 'keep_best': 2})
  for every, fits in ((0, False), (15, False), (20, True), (40, True)):
    config.eval.every = every
    if fits:
      common.check(config)
      continue
    with pytest.raises(ValueError, match=f'multiple of eval.every .{every}.'):
      common.check(config)


def test_a_key_that_a_checkpoint_is_too_old_for_is_at_its_default():
  here = common.plain(common.defaults())
  there = common.plain(common.defaults())
  for key in common.SINCE:
    *groups, name = key.split('.')
    group = there
    for part in groups:
      group = group[part]
    del group[name]
  assert common.differing(there, here) == []
  del there['model']['cms']['remat']  # how it is computed, no other run
  here['model']['cms']['remat'] = 'groups'
  assert common.differing(there, here) == []
  here['data']['new'] = None  # as where nothing was said of it
  assert common.differing(there, here) == []
  here['data']['shards'] = 2
  (line,) = common.differing(there, here)
  assert line == 'data.shards is 1 there and 2 here'
