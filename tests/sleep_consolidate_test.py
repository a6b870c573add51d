"""Room for a new slot: a free one, or one that a merge has freed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.cms.experts import SlotsError
from nestax.sleep import consolidate, grow, seed, tools
from nestax.sleep import reader as readers
from nestax.sleep.objective import SeedConfig, Side
from nestax.sleep.reader import Said
from nestax.sleep.texts import Day, Words
from nestax.sleep.tools import CycleConfig


def full():
  """A model whose slowest levels have used up both of their slots."""
  cfg = cases.config(N=1, slots=2, rank=8)
  params = cases.params_of(cfg)
  for index in (0, 1):
    params, _ = grow.grow(cfg, params, 1)
    new = grow.take(cfg, params, 1, index)
    noise = jax.random.normal(jax.random.key(index), new.b_nxRxD.shape)
    params = grow.put(cfg, params, 1, index, new._replace(b_nxRxD=0.1 * noise))
  return cfg, params


def room(k, rows=32, pad=0, **how):
  cfg, params = full()
  made = tools.of_model(cfg, CycleConfig(**how), Words(0, -1, 0))
  tokens = np.pad(np.asarray(cases.tokens(rows, 10)), ((0, 0), (0, pad)))
  said = Said(tokens, np.ones(rows, int), np.full(rows, 10))
  day = Day((0,), ('ann',), (said,))
  return cfg, consolidate._room(made, params, k, day, jax.random.key(0))


def test_a_free_slot_is_taken_as_it_is():
  cfg, (params, index, lost) = room(0)
  assert (index, lost) == (0, None) and grow.used(cfg, params, 0) == 1


def test_used_up_levels_are_merged_if_asked_and_if_little_is_lost():
  with pytest.raises(SlotsError, match='period 8: all 2 expert slots'):
    room(1)
  with pytest.raises(consolidate.MergeError, match='would lose') as refused:
    room(1, full='merge', lost=0.0)
  assert 0 < refused.value.lost <= 1 and 'more slots' not in str(refused.value)
  cfg, (params, index, lost) = room(1, full='merge', lost=1.0)
  assert index == 0 and 0 < lost <= 1
  assert grow.used(cfg, params, 1) == 1


def test_what_a_merge_of_one_text_loses_is_not_measured_on_what_it_fits():
  # on itself it would seem to lose a fifth, and elsewhere loses all
  with pytest.raises(consolidate.MergeError) as refused:
    room(1, rows=1, full='merge', lost=0.5)
  assert refused.value.lost > 0.5


def test_padding_does_not_count_in_a_merge():
  _, (want, _, lost) = room(1, full='merge', lost=1.0)
  _, (got, _, same) = room(1, pad=30, full='merge', lost=1.0)
  np.testing.assert_allclose(same, lost, rtol=1e-3)
  down = [x['blocks']['level_1']['down'] for x in (got, want)]
  np.testing.assert_allclose(*down, atol=1e-4)


def test_a_sender_gives_away_its_slots_and_all_owners_are_asked_alike(
  monkeypatch,
):
  cfg = cases.config(N=1, slots=2, rank=8)
  params, _ = grow.grow(cfg, cases.params_of(cfg), 0)
  how = CycleConfig(seed=SeedConfig(rows=3))
  made = tools.of_model(cfg, how, Words(0, -1, 0))
  context = readers.learned(cases.day(cfg, 2))
  texts = Said(cases.tokens(8, 10), jnp.ones(8, int), jnp.full(8, 10))
  day, asked = Day((0, 1), ('ann', 'bob'), ()), {}

  def run(how, programs, teacher, student, trained, draw, key, tell, keep):
    asked.update(student=student, drawn=draw(key), kept=keep(key))
    return jax.tree.map(lambda x: x + 1, trained), {}

  monkeypatch.setattr(seed, 'run', run)
  student = Side(params, consolidate.reset(context, 0))
  new, index, _ = consolidate.move(
    made, Side(params, context), student, 0, day, texts, texts,
    jax.random.key(0), None,
  )  # fmt: skip
  assert (grow.used(cfg, new, 0), grow.used(cfg, new, 1)) == (0, 1)
  _, to, at = asked['student'].params
  assert (int(to), int(at), index) == (1, 0, 0)
  assert (grow.take(cfg, new, 1, 0).b_nxRxD == 1).all()
  assert len(asked['drawn'].length_B) == len(asked['kept'].length_B) == 6
  # the sender's levels are zeros, the others still hold what they have written
  gone, left = asked['student'].context
  assert not any(x.any() for x in jax.tree.leaves(gone))
  jax.tree.map(np.testing.assert_array_equal, left, context[1])


def test_levels_that_were_reset_count_as_zeros():
  like = (jnp.ones(3), jnp.full(2, 5.0))
  first, second = consolidate._filled(consolidate.reset(like, 0), like)
  assert not first.any() and (second == 5.0).all()
