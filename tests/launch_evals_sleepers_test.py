"""What a model may do at night besides sleep, in the same harness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.launch.evals import sleepers
from nestax.sleep import distributions, gate
from nestax.sleep import reader as readers
from nestax.sleep.objective import SeedConfig
from nestax.sleep.reader import Said
from nestax.sleep.texts import Day, TextsConfig, Words
from nestax.sleep.tools import CycleConfig

RATE = 0.03
HOW = CycleConfig(
  SeedConfig(steps=6, rows=4, alpha=1.0, on_policy=0.0),
  TextsConfig(length=10, read=8, continued=0, free=0, kept=4),
)
WORDS = Words(bos=0, eos=-1, pad=0)


def said(token, rows, pad=0):
  """Rows of one token, six times, then padding."""
  tokens = np.full((rows, 10), token)
  tokens[:, 6:] = pad
  return Said(tokens, np.ones(rows, int), np.full(rows, 6))


def evening(past=None, pad=0):
  cfg = cases.config()
  day = Day((0,), ('ann',), (said(5, 6, pad),))
  state, key = cases.day(cfg, 1), jax.random.key(0)
  params = cases.params_of(cfg)
  return sleepers.Evening(params, state, day, past, None, (), 1, key)


@functools.cache
def sleeper(name):
  return sleepers.make(name, cases.config(), HOW, WORDS, RATE)


@pytest.fixture
def drawn(monkeypatch):
  """How many rows there are, and how many of them an update takes."""
  found, real = [], sleepers.texts.drawer

  def drawer(texts, owners, rows):
    found.append((len(texts.length_B), rows))
    return real(texts, owners, rows)

  monkeypatch.setattr(sleepers.texts, 'drawer', drawer)
  return found


def nats(params, rows):
  reader = readers.of_model(cases.config())
  return gate.loss(reader, params, None, rows.tokens_BxL, rows.length_B)


def test_fine_tuning_learns_the_day_and_half_of_it_from_earlier_ones(drawn):
  params, tune = evening().params, sleeper('fine-tuning, replay').night
  alone, numbers, seconds = tune(evening())
  assert drawn == [(6, 4)]
  assert nats(alone, said(5, 2)) < nats(params, said(5, 2)) - 1
  assert np.isfinite(numbers['nats']) and set(seconds) == {'fine-tuning'}
  both, _, _ = tune(evening(past=said(7, 3)))
  assert drawn[1:] == [(6, 2), (3, 2)]
  assert nats(both, said(7, 2)) < nats(alone, said(7, 2)) - 0.5
  # what is behind a text's end teaches nothing
  other, _, _ = tune(evening(pad=9))
  jax.tree.map(np.testing.assert_array_equal, alone, other)
  for path, old in jax.tree_util.tree_leaves_with_path(params):
    new = functools.reduce(lambda t, k: t[k.key], path, alone)
    assert (path[-1].key in sleepers.KERNELS) == (new is not old)


def test_distillation_without_growth_teaches_mlps_what_the_levels_hold(drawn):
  given, distil = evening(past=said(7, 3)), sleeper('no expansion').night
  params, numbers, _ = distil(given)
  assert drawn == [(8, 4), (4 + 3, 4)]
  assert numbers['kept_0'] > 0
  reader, context = (
    readers.of_model(cases.config()),
    readers.learned(given.state),
  )
  rows = jnp.asarray(said(5, 1).tokens_BxL)
  score = jax.jit(functools.partial(readers.score, reader))
  teacher, before, after = (
    score(*side, rows)
    for side in ((given.params, context), (given.params, None), (params, None))
  )
  apart = functools.partial(distributions.divergence, 'reverse_kl', teacher)
  assert apart(after).mean() < 0.8 * apart(before).mean()


def test_every_way_gets_its_rate_and_its_texts(monkeypatch):
  made = []
  monkeypatch.setattr(sleepers, '_tune', lambda *x: made.append(x))
  monkeypatch.setattr(sleepers, '_distil', lambda *x: made.append(x))
  for name in ('fine-tuning', 'fine-tuning, replay', 'no expansion'):
    sleepers.make(name, None, HOW, WORDS, RATE)
  assert [how.seed.rate for _, how, _ in made] == [RATE] * 3
  assert [last for _, _, last in made] == [False, True, WORDS]
  awake = sleeper('no sleep')
  assert awake.night(evening())[0] is evening().params and not awake.resets
  with pytest.raises(ValueError, match="'nap' is not one of sleep"):
    sleeper('nap')
