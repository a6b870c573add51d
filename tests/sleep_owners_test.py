"""Slots of one's own: read by their owner, taught at night, gone with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.cms import experts
from nestax.cms.experts import SlotsError
from nestax.launch import life
from nestax.models import language_model, model_state
from nestax.sleep import owners, replay, texts
from nestax.sleep import tools as tools_
from nestax.sleep.gate import GateConfig
from nestax.sleep.objective import SeedConfig
from nestax.sleep.reader import Said
from nestax.sleep.texts import TextsConfig, Words
from nestax.sleep.tools import CycleConfig

HOW = CycleConfig(
  SeedConfig(steps=6, rate=0.03, rows=4, alpha=1.0, on_policy=0.0),
  TextsConfig(length=10, read=4, continued=0, free=0),
  GateConfig(core=9.0, day=-0.9),
)
NAMES = ('ann', 'bob', 'cid')
CFG = cases.config(slots=2, rank=4, scope='owner')


@functools.cache
def tools(how=HOW):
  return tools_.of_model(CFG, how, Words(bos=0, eos=-1, pad=0))


def model_params():
  return cases.params_of(CFG)


def same(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all((np.asarray(x) == np.asarray(y)).all() for x, y in pairs)


def taught(state):
  """The state with something in one slot of everybody, another for each."""

  def teach(i, slots):
    b = jax.random.normal(jax.random.key(i), slots.b_SxRxD.shape)
    grown = experts.activate(slots, 0)
    return grown._replace(b_SxRxD=b)

  owned = tuple(teach(i, slots) for i, slots in enumerate(state.owned))
  return state._replace(owned=owned)


@jax.jit
def read(params, state, tokens):
  return language_model.LanguageModel(CFG).apply(
    {'params': params}, state, tokens
  )


def test_everybody_reads_with_slots_of_their_own():
  """As the model would whose slots are theirs, levels learning meanwhile."""
  state, tokens = (
    taught(model_state.init_state(CFG, 2, 12)),
    cases.tokens(2, 9),
  )
  after, logits = read(model_params(), state, tokens)
  plain = model_state.init_state(CFG, 2, 12)
  assert np.abs(read(model_params(), plain, tokens)[1] - logits).max() > 0.1
  for row in range(2):
    mine = owners.personal(model_params(), state, row)
    alone = model_state.take_row(state, row)._replace(owned=None)
    end, want = read(mine, alone, tokens[row : row + 1])
    np.testing.assert_allclose(logits[row : row + 1], want, atol=2e-5)
    got = model_state.take_row(after, row)
    for a, b in zip(got.levels.levels, end.levels.levels):
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5),
        a.delta,
        b.delta,
      )
  assert same(after.owned, state.owned)


def test_empty_slots_of_their_own_change_no_logit():
  tokens = cases.tokens(2, 9)
  state = model_state.init_state(CFG, 2, 12)
  _, want = read(model_params(), state, tokens)
  grown = tuple(experts.activate(slots, 1) for slots in state.owned)
  assert same(
    read(model_params(), state._replace(owned=grown), tokens)[1], want
  )
  # another program, to the bit or nearly so
  _, shared = read(model_params(), state._replace(owned=None), tokens)
  np.testing.assert_allclose(want, shared, atol=1e-6)


@pytest.mark.parametrize('family', ['hope', 'hope_attention'])
def test_a_row_is_taken_and_put_back(family):
  cfg = cases.config(family, slots=2, rank=4, scope='owner')
  state = cases.day(cfg, 3)
  row = model_state.take_row(state, 1)
  like = jax.eval_shape(lambda: model_state.init_state(cfg, 1, 32))
  assert jax.tree.map(jnp.shape, row) == jax.tree.map(jnp.shape, like)
  empty = model_state.init_state(cfg, 3, 32)
  put = model_state.put_row(empty, 1, row)
  assert same(model_state.take_row(put, 1), row)
  for other in (0, 2):
    fresh = model_state.take_row(empty, other)
    assert same(model_state.take_row(put, other), fresh)
  assert not same(put, empty)


def gathered(names=NAMES[:2]):
  held = replay.Replay(400)
  for name in names:
    for row in np.asarray(cases.tokens(4, 10, seed=NAMES.index(name))):
      held.add(replay.Piece(name, tuple(map(int, row)), surprise=1.0))
  return texts.gather(HOW.texts, 0, NAMES, held)


@functools.cache
def sleep(names=NAMES[:2], how=HOW):
  core = Said(cases.tokens(4, 10, 9), jnp.full(4, 1), jnp.full(4, 10))
  state = cases.day(CFG, 3)
  args = model_params(), state, gathered(names), core, 1, jax.random.key(0)
  return state, owners.night(tools(how), *args)


def test_a_night_teaches_owners_and_leaves_the_weights_of_all():
  state, slept = sleep()
  assert slept.decision.accepted and slept.owners == NAMES[:2]
  assert same(slept.params, model_params())
  assert owners.used(CFG, slept.params, slept.state) == [0, 2]
  for row in (0, 1):
    assert not same(
      model_state.take_row(slept.state, row).owned,
      model_state.take_row(state, row).owned,
    )
    deltas = [x.delta for x in slept.state.levels.levels]
    assert not any(np.asarray(x)[:, row].any() for x in jax.tree.leaves(deltas))
  # cid read nothing
  took = model_state.take_row
  assert same(took(slept.state, 2), took(state, 2))
  ann, bob = (took(slept.state, row).owned for row in (0, 1))
  assert not same(ann, bob)
  assert 'ann: accepted' in slept.decision.reason
  assert slept.metrics['slots_1'] == 2


def test_owners_sleep_as_if_alone():
  _, together = sleep()
  _, alone = sleep(('bob',))
  took = model_state.take_row
  assert same(took(together.state, 1), took(alone.state, 1))
  assert alone.owners == ('bob',)


def test_a_night_that_one_gate_refuses_is_taken_back_for_its_owner(monkeypatch):
  decide = owners.cycle.gate.decide
  seen = []

  def only_the_second(*args):
    seen.append(decide(*args))
    return dataclasses.replace(seen[-1], accepted=len(seen) == 2)

  monkeypatch.setattr(owners.cycle.gate, 'decide', only_the_second)
  state, slept = sleep.__wrapped__()
  assert slept.owners == ('bob',) and slept.decision.accepted
  took = model_state.take_row
  assert same(took(slept.state, 0), took(state, 0))
  assert same(took(slept.state, 1), took(sleep()[1].state, 1))


def test_slots_go_with_their_owner():
  state = taught(cases.day(CFG, 2))
  fresh = model_state.init_state(CFG, 2, 32)
  gone = life.where_owners(np.array([True, False]), fresh, state)
  took = model_state.take_row
  assert same(took(gone, 0), took(fresh, 0))
  assert same(took(gone, 1), took(state, 1))


def test_slots_of_ones_own_are_not_merged():
  with pytest.raises(SlotsError, match="full='merge' and cms.scope='owner'"):
    owners.check(CFG, 'merge')
  owners.check(cases.config(slots=2), 'merge')


def test_room_is_looked_for_in_the_slots_of_who_sleeps():
  state = model_state.init_state(CFG, 3, 32)

  def fill(slots):
    grown = experts.activate(experts.activate(slots, 0), 1)
    active = slots.active_S.at[:, 0].set(grown.active_S[:, 0])
    return slots._replace(active_S=active)

  full = state._replace(owned=tuple(map(fill, state.owned)))
  look = functools.partial(owners.check_room, tools(), model_params())
  look(state, gathered(), 1)
  look(full, gathered(('bob',)), 1)
  for names in (NAMES[:2], ('ann',)):
    with pytest.raises(SlotsError, match='all 2 expert slots'):
      look(full, gathered(names), 1)
  merging = dataclasses.replace(HOW, full='merge')
  owners.check_room(tools(merging), model_params(), full, gathered(), 1)


def test_shared_slots_are_nobodys_in_the_state():
  assert model_state.init_state(cases.config(slots=2), 2, 8).owned is None
  assert model_state.init_state(cases.config(scope='owner'), 2, 8).owned is None
