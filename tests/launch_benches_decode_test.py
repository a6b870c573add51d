"""nestax-bench decode times streams whose clocks stand where they say."""

import jax
import numpy as np
import pytest

from nestax.launch.benches import decode
from nestax.models import language_model
from nestax.models.config import ModelConfig

TINY = [
  'model.V=32',
  'model.D=16',
  'model.H=1',
  'model.F=32',
  'model.N=1',
  'model.memory.chunk_mem=4',
  'model.memory.chunk_rest=4',
  'model.cms.periods=(4,8)',
]


def model(family: str, levels: str) -> ModelConfig:
  made = decode.cases(
    ['tiny'], [*TINY, f'model.family={family}'], ['0'], [levels], 'all'
  )
  return next(iter(made.values()))


def params_of(cfg):
  lm = language_model.LanguageModel(cfg)
  tokens = np.zeros((1, 1), np.int32)
  boxed = jax.jit(lm.init)(jax.random.key(0), None, tokens)['params']
  return decode.nn.unbox(boxed)


@pytest.mark.parametrize(
  'family', ['hope', pytest.param('hope_attention', marks=pytest.mark.slow)]
)
def test_far_is_near_with_later_clocks(family):
  cfg = model(family, 'first_order')
  assert decode.period(cfg) == 8
  params = params_of(cfg)
  near, far = (decode.at(cfg, params, 1, p, room=4) for p in (5, 800_005))
  assert far.levels.clock_B == 800_005 and near.levels.clock_B == 5
  assert far.levels.held_B == near.levels.held_B == 1
  assert far.levels.levels[0].commits_B == 1, 'it learned at 800,004'
  if family == 'hope':
    near = near.blocks.mixer.memory
    far = far.blocks.mixer.memory
    np.testing.assert_array_equal(far.position_B, near.position_B)
    assert np.abs(far.running.stack).max() > 0
  else:
    assert far.blocks.mixer.clock_B.max() == 800_005
    # the cache that the held tokens will be read again with
    assert far.levels.boundary.mixer.clock_B.max() == 800_004


def test_the_cache_of_the_pending_tokens_is_as_late_as_the_stream():
  # none are pending: nothing read has renewed the state at the chunk's start
  cfg = model('hope_attention', 'first_order')
  state = decode.at(cfg, None, 1, 800_000, room=4)
  assert state.blocks.mixer.clock_B.tolist() == [[800_000]]
  assert state.levels.boundary.mixer.clock_B.tolist() == [[800_000]]


def test_a_transformers_clock_is_that_of_its_cache():
  cfg = model('transformer', 'frozen')
  state = decode.at(cfg, params_of(cfg), 2, 70, room=6)
  assert state.blocks.mixer.clock_B.tolist() == [[70, 70]]
  assert state.blocks.mixer.key_BxSxGxK.shape[2] == 76


def test_rows_are_in_milliseconds_and_ratios_of_them(capsys):
  words = [*TINY, 'model.family=hope_attention', 'model.window=4']
  made = decode.cases(
    ['tiny'], words, ['8', '1000000'], ['frozen', 'first_order'], 'all'
  )
  rows = decode.measure(made, batch=2, tokens=0, repeats=2)
  window = max(decode.period(cfg) for cfg in made.values())
  words = f'4 streams, 2 windows of {window} tokens each: {8 * window} tokens'
  assert words in capsys.readouterr().err
  near, far, learning, _ = rows
  assert near['time / first position'] == near['time / frozen'] == 1
  assert far['time / first position'] == far['ms'] / near['ms']
  assert learning['time / frozen'] == learning['ms'] / near['ms']
  for row in rows:
    assert 0 < row['median token'] <= row['dearest token']
    assert 0 < row['ms'] <= row['dearest token']


def test_a_position_that_is_none_is_refused():
  with pytest.raises(ValueError, match='--positions=far'):
    decode.cases(['tiny'], TINY, ['far'], ['frozen'], 'all')
