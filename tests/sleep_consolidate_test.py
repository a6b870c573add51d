"""Room for a new slot: a free one, or one that a merge has freed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.cms.experts import SlotsError
from nestax.sleep import consolidate, grow, tools
from nestax.sleep.reader import Said
from nestax.sleep.texts import Day, Words
from nestax.sleep.tools import CycleConfig


def full():
  """A model whose slowest levels have used up both of their slots."""
  cfg = cases.config(slots=2, rank=8)
  params = cases.params_of(cfg)
  for index in (0, 1):
    params, _ = grow.grow(cfg, params, 1)
    new = grow.take(cfg, params, 1, index)
    noise = jax.random.normal(jax.random.key(index), new.b_nxRxD.shape)
    params = grow.put(cfg, params, 1, index, new._replace(b_nxRxD=0.1 * noise))
  return cfg, params


def room(k, **how):
  cfg, params = full()
  made = tools.of_model(cfg, CycleConfig(**how), Words(0, -1, 0))
  tokens = np.asarray(cases.tokens(32, 10))
  day = Day((0,), ('ann',), (Said(tokens, np.ones(32, int), np.full(32, 10)),))
  return cfg, consolidate._room(made, params, k, day, jax.random.key(0))


def test_a_free_slot_is_taken_as_it_is():
  cfg, (params, index, lost) = room(0)
  assert (index, lost) == (0, None) and grow.used(cfg, params, 0) == 1


def test_used_up_levels_are_merged_if_asked_and_if_little_is_lost():
  with pytest.raises(SlotsError, match='period 8: all 2 expert slots'):
    room(1)
  with pytest.raises(SlotsError, match='merging them .* would lose'):
    room(1, full='merge', lost=0.0)
  cfg, (params, index, lost) = room(1, full='merge', lost=1.0)
  assert index == 0 and 0 < lost <= 1
  assert grow.used(cfg, params, 1) == 1


def test_levels_that_were_reset_count_as_zeros():
  like = (jnp.ones(3), jnp.full(2, 5.0))
  first, second = consolidate._filled(consolidate.reset(like, 0), like)
  assert not first.any() and (second == 5.0).all()
