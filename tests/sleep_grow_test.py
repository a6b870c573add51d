"""Growth changes no logit; what is freed is gone; a full level says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.cms.experts import SlotsError
from nestax.launch import mesh
from nestax.models import axes, language_model, model_state
from nestax.sleep import grow


def model(**cms):
  cfg = cases.config(**{'slots': 2, 'rank': 3, **cms})
  return cfg, cases.params_of(cfg)


def logits(cfg, params):
  given = {'params': params}, None, cases.tokens(2, 8)
  return cases.applied(cfg)(*given)[1]


def filled(cfg, params, k, index, size=0.3):
  new = grow.take(cfg, params, k, index)
  new = new._replace(b_nxRxD=jnp.full_like(new.b_nxRxD, size))
  return grow.put(cfg, params, k, index, new)


def leaves(tree):
  return {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize('assign', ['chain', 'groups'])
def test_growth_changes_no_logit_and_one_level_alone(assign):
  cfg, params = model(assign=assign)
  before = logits(cfg, params)
  grown, index = grow.grow(cfg, params, 1)
  assert (index, grow.used(cfg, grown, 1), grow.used(cfg, grown, 0)) == (
    0,
    1,
    0,
  )
  np.testing.assert_array_equal(logits(cfg, grown), before)
  _, index = grow.grow(cfg, grown, 1)
  assert index == 1
  told = filled(cfg, grown, 1, 0)
  assert np.abs(logits(cfg, told) - before).max() > 1e-3
  old, new = leaves(params), leaves(told)
  changed = [path for path in old if (old[path] != new[path]).any()]
  level = 'level_0' if assign == 'groups' else 'level_1'
  assert all(level in path and 'slots' in path for path in changed)


def test_a_freed_slot_says_nothing_and_holds_nothing():
  cfg, params = model()
  before = logits(cfg, params)
  told = filled(cfg, grow.grow(cfg, params, 0)[0], 0, 0)
  freed = grow.free(cfg, told, 0, jax.random.key(3))
  np.testing.assert_array_equal(logits(cfg, freed), before)
  left = grow.slots(cfg, freed, 0)
  assert not left.b_SxRxD.any() and not left.active_S.any()
  assert (left.a_SxDxR != grow.slots(cfg, told, 0).a_SxDxR).all()


def test_a_level_that_gives_first_has_room_for_what_it_is_given():
  cfg, params = model(periods=(4, 8, 16), width='full')
  for _ in range(2):
    params, _ = grow.grow(cfg, params, 1)
  grow.check_room(cfg, params, (2, 1, 0))  # the second level has given by then
  with pytest.raises(SlotsError, match='period 8: all 2 expert slots'):
    grow.check_room(cfg, params, (2, 0))
  grown, _ = grow.grow(cfg, params, 2)
  with pytest.raises(SlotsError, match='period 16: all 2 expert slots'):
    grow.check_room(cfg, grown, (2, 1, 0))  # one slot for two


def test_one_program_puts_a_slot_into_whichever_level_is_chosen():
  cfg, params = model()
  new = grow.take(cfg, params, 0, 1)
  new = jax.tree.map(lambda x: x + 1.0, new)

  @jax.jit
  def put(k, index):
    return grow.put_among(cfg, params, (0, 1), k, index, new)

  for k in (0, 1):
    want = grow.put(cfg, params, k, 1, new)
    jax.tree.map(np.testing.assert_array_equal, put(k, 1), want)
  assert put._cache_size() == 1


def test_a_level_without_a_free_slot_says_so():
  cfg, params = model(slots=1)
  grown, _ = grow.grow(cfg, params, 1)
  with pytest.raises(SlotsError, match='period 8: all 1 expert slots'):
    grow.grow(cfg, grown, 1)


@pytest.mark.parametrize(
  'cms, words',
  [({'slots': 0}, 'cms.slots=0'), ({'blocks': 'none'}, 'nothing to')],
)
def test_a_model_that_cannot_sleep_says_why(cms, words):
  with pytest.raises(SlotsError, match=words):
    grow.check(cases.config(**{'slots': 2, 'rank': 3, **cms}))


def test_emptied_levels_are_as_new_for_the_chosen_sequences_alone():
  cfg, _ = model(optimizer='momentum', variant='nested')
  fresh = model_state.init_state(cfg, 2, 32)
  day = jax.tree.map(jnp.ones_like, fresh)  # every array has been written
  night = grow.empty(cfg, day, 0, jnp.array([True, False]))
  new, old, born = leaves(night), leaves(day), leaves(fresh)
  for path in old:
    if '.levels.levels[0]' not in path or 'commits' in path:
      np.testing.assert_array_equal(new[path], old[path], err_msg=path)
      continue
    axis = 0 if old[path].ndim == 1 else 1
    for row, want in enumerate((born, old)):
      np.testing.assert_array_equal(
        np.take(new[path], row, axis), np.take(want[path], row, axis)
      )
  every = grow.empty(cfg, day, 1).levels.levels[1]
  assert not any(x.any() for x in every.delta)


def test_merging_keeps_what_an_mlp_can_say_and_frees_the_slots():
  cfg, params = model()
  told = filled(cfg, grow.grow(cfg, params, 1)[0], 1, 0, size=0.05)
  texts = cases.tokens(32, 16, seed=5)
  merged, error = grow.merge(cfg, told, 1, texts, jax.random.key(0))
  assert grow.used(cfg, merged, 1) == 0
  lost = np.abs(logits(cfg, merged) - logits(cfg, told)).max()
  moved = np.abs(logits(cfg, params) - logits(cfg, told)).max()
  assert lost < moved and 0 < error < 1
  with pytest.raises(SlotsError, match='1 rows to merge on'):
    grow.merge(cfg, told, 1, texts[:1], jax.random.key(0))


def test_a_model_without_slots_is_given_some():
  cfg, params = model(slots=0)
  before = logits(cfg, params)
  new, given = grow.equip(cfg, params, 3, 2, jax.random.key(0))
  # two programs, which need not round alike; activation is tested to the bit
  np.testing.assert_allclose(logits(new, given), before, atol=1e-6)
  like = leaves(cases.params_of(model(slots=3, rank=2)[0]))
  assert {k: x.shape for k, x in leaves(given).items()} == {
    k: x.shape for k, x in like.items()
  }
  grown, index = grow.grow(new, given, 1)
  told = filled(new, grown, 1, index)
  assert np.abs(logits(new, told) - before).max() > 1e-3
  with pytest.raises(SlotsError, match='has 3 expert slots a level already'):
    grow.equip(new, given, 3, 2, jax.random.key(0))


def test_slots_of_a_model_on_a_mesh_stay_where_they_are():
  cfg, params = model(rank=4)
  boxed = language_model.abstract(language_model.LanguageModel(cfg))
  sizes = {'data': 1, 'fsdp': 2, 'tensor': 2, 'sequence': 1}
  where = axes.shardings(mesh.make(sizes, 2, 8), boxed)
  laid = jax.device_put(params, where)
  slot = laid['blocks']['level_1']['slots']['a']
  assert len({s.data.shape for s in slot.addressable_shards}) == 1
  assert slot.addressable_shards[0].data.size < slot.size

  def night(params):
    params, index = grow.grow(cfg, params, 1)
    told = filled(cfg, params, 1, index)
    return told, grow.free(cfg, told, 1, jax.random.key(1))

  for got, want in zip(night(laid), night(params)):
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for x, place in zip(jax.tree.leaves(got), jax.tree.leaves(where)):
      assert x.sharding.is_equivalent_to(place, x.ndim), (x.shape, x.sharding)


@pytest.mark.parametrize('k', [-1, 2])
def test_levels_that_are_not_there_are_refused(k):
  cfg, params = model()
  state = model_state.init_state(cfg, 2, 8)
  words = f'levels {k}: .* 2 kinds that learn, .* 0 and the slowest 1'
  for ask in (
    lambda: grow.grow(cfg, params, k),
    lambda: grow.take(cfg, params, k, 0),
    lambda: grow.empty(cfg, state, k),
    lambda: grow.period(cfg, k),
    lambda: grow.receiver(cfg, k),
  ):
    with pytest.raises(SlotsError, match=words):
      ask()


@pytest.mark.parametrize('index', [-1, 2])
def test_slots_that_are_not_there_are_refused(index):
  cfg, params = model()
  words = f'slot {index}: a level has 2, from 0 to 1'
  with pytest.raises(SlotsError, match=words):
    grow.take(cfg, params, 0, index)
  with pytest.raises(SlotsError, match=words):
    grow.put(cfg, params, 0, index, grow.take(cfg, params, 0, 0))


def test_a_merge_on_what_is_no_text_does_not_say_that_nothing_is_lost():
  cfg, params = model()
  params, _ = grow.grow(cfg, params, 1)
  params = filled(cfg, params, 1, 0)
  for wrong in (-1, cases.V):
    tokens_BxL = cases.tokens(8, 8).at[:, 3].set(wrong)
    merged = grow.merge(cfg, params, 1, tokens_BxL, jax.random.key(0))
    assert not merged.error <= 1.0
