"""A night moves what was learned, frees what held it, and can be undone."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.cms.experts import SlotsError
from nestax.models import model_state
from nestax.sleep import cycle, gate, grow, replay, texts
from nestax.sleep import tools as tools_
from nestax.sleep.dream import DreamConfig
from nestax.sleep.gate import GateConfig
from nestax.sleep.objective import SeedConfig, Side
from nestax.sleep.reader import Said
from nestax.sleep.task import TaskError
from nestax.sleep.texts import TextsConfig, Words
from nestax.sleep.tools import CycleConfig

HOW = CycleConfig(
  SeedConfig(steps=25, rate=0.03, rows=4, alpha=1.0, on_policy=0.0),
  TextsConfig(length=10, read=8, continued=0, free=0),
  GateConfig(core=9.0, day=-0.9),
)
WORDS = Words(bos=0, eos=-1, pad=0)
OWNERS = ('ann', 'bob', 'cid')


@functools.cache
def model(**cms):
  cfg = cases.config(**{'slots': 2, 'rank': 8, **cms})
  return cfg, cases.params_of(cfg)


@functools.cache
def tools(how=HOW, **cms):
  return tools_.of_model(model(**cms)[0], how, WORDS)


def buffer(owners=OWNERS[:2]):
  held = replay.Replay(400)
  for i, name in enumerate(owners):
    for row in np.asarray(cases.tokens(4, 10, seed=i)):
      held.add(replay.Piece(name, tuple(map(int, row)), surprise=1.0 + 4 * i))
  return held


def gathered(held=None, **options):
  return texts.gather(HOW.texts, 0, OWNERS, held or buffer(), **options)


def core():
  return Said(cases.tokens(4, 10, 9), jnp.full(4, 1), jnp.full(4, 10))


def sleep(how=HOW, params=None, number=1, tell=None, tasks=()):
  made = tools(how)
  state = cases.day(made.cfg, 3)
  params = model()[1] if params is None else params
  args = made, params, state, gathered(), core(), number, jax.random.key(0)
  return state, cycle.night(*args, tell, tasks)


@functools.cache
def one_night():
  return sleep()


def same(a, b):
  return all(
    (np.asarray(x) == np.asarray(y)).all()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_the_slots_take_up_what_the_levels_held():
  _, slept = one_night()
  m = slept.metrics
  assert slept.decision.accepted and slept.owners == ('ann', 'bob')
  params = model()[1]
  for name in ('core', 'day'):  # each is of the model that it says
    assert m[f'{name}_after'] != m[f'{name}_before']
  assert abs(m['day_dusk'] - m['day_before']) > 0.01
  tokens, _, length = core()
  want = gate.loss(tools(HOW).reader, params, None, tokens, length)
  assert m['core_before'] == want
  for k in (0, 1):
    assert m[f'divergence_{k}'] < m[f'divergence_{k}_first']
    assert m[f'written_{k}'] > 0
    assert m[f'kept_{k}'] < m[f'divergence_{k}_first']
  # the slowest levels' own slot, and the one that the fast levels' went to
  assert (m['slots_0'], m['slots_1']) == (0, 2)
  each = {f'consolidate every {p}' for p in model()[0].stream.periods}
  assert set(slept.seconds) == {'compute', 'texts', 'gate'} | each
  assert tools(HOW).seeds[1].learn._cache_size() == 1  # for both pairs


def test_only_slots_change_and_only_owners_are_emptied():
  state, slept = one_night()
  params = model()[1]
  for path, old in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path)
    new = functools.reduce(lambda t, k: t[k.key], path, slept.params)
    assert "['slots']" in name or new is old, name
  for before, after in zip(state.levels.levels, slept.state.levels.levels):
    for old, new in zip(before.delta, after.delta):
      assert not new[:, :2].any()
      np.testing.assert_array_equal(new[:, 2], old[:, 2])


def test_who_does_not_sleep_goes_on_to_wait_for_commits(monkeypatch):
  cfg, params = model()
  state, losses = cases.day(cfg, 3), {}
  for name in ('core', 'day'):
    losses |= {f'{name}_before': 1.0, f'{name}_after': 1.0}
  monkeypatch.setattr(cycle, '_texts', lambda *args: (None, None))
  monkeypatch.setattr(cycle, '_dusk_loss', lambda *args: 0.0)
  monkeypatch.setattr(cycle, '_losses', lambda *args: losses)
  monkeypatch.setattr(
    cycle.consolidate, 'move', lambda tools, teacher, student, k, *rest: (
      student.params, k, {}
    ),
  )  # fmt: skip

  def compute(params, state):
    return jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, state)

  slept = cycle.night(
    tools(HOW)._replace(compute=compute), params, state, gathered(), core(), 1,
    jax.random.key(0),
  )  # fmt: skip
  assert slept.decision.accepted and slept.owners == ('ann', 'bob')
  rows = [model_state.take_row(slept.state, row) for row in range(3)]
  old = [model_state.take_row(state, row) for row in range(3)]
  assert same(rows[2], old[2])
  for row in (0, 1):
    clocks = rows[row].levels.clock_B, old[row].levels.clock_B
    assert clocks[0] == clocks[1] + 1


def test_the_driver_hands_on_what_each_step_is_to_work_with(monkeypatch):
  cfg, params = model(periods=(4, 8, 16), width='full', slots=3)
  made, told = tools(HOW, periods=(4, 8, 16), width='full', slots=3), []

  def texts_(tools, teacher, day, key, past):
    told.append(('texts', past))
    return 'made', 'kept'

  def move(tools, teacher, student, k, *rest):
    missing = [i for i, tree in enumerate(student.context) if tree is None]
    told.append((k, missing, rest[1:3], teacher.params is params))
    return student.params, 10 + k, {}

  def dream_on(tools, params, k, index, tasks, key):
    told.append(('dream', k, index))
    return params, {}

  monkeypatch.setattr(cycle, '_texts', texts_)
  monkeypatch.setattr(cycle.consolidate, 'move', move)
  monkeypatch.setattr(cycle.consolidate, 'dream_on', dream_on)
  monkeypatch.setattr(cycle, '_dusk_loss', lambda *args: 0.0)
  losses = dict.fromkeys(('core_before', 'day_before'), 1.0)
  losses |= dict.fromkeys(('core_after', 'day_after'), 1.0)
  monkeypatch.setattr(cycle, '_losses', lambda *args: losses)
  made = made._replace(compute=lambda params, state: state)
  past = core()
  cycle.night(
    made, params, cases.day(cfg, 3), gathered(), core(), 1, jax.random.key(0),
    tasks=[After()], past=past,
  )  # fmt: skip
  texts_of = ('made', 'kept')
  assert told == [
    ('texts', past),
    (2, [2], texts_of, True),
    (1, [1, 2], texts_of, True),
    (0, [0, 1, 2], texts_of, True),
    # the slowest level's newest slot: what level 1 gave it
    ('dream', 2, 11),
  ]


def test_what_a_night_rehearses_is_kept():
  rows = Said(np.full((3, 10), 5), np.ones(3, int), np.full(3, 10))
  tools = types.SimpleNamespace(
    how=HOW, words=WORDS, speak=lambda params, context, prompts, key: prompts
  )
  given = gathered(), jax.random.key(0), rows
  _, kept = cycle._texts(tools, Side(None, None), *given)
  assert len(kept.length_B) == HOW.texts.kept + 3
  assert (kept.tokens_BxL[-3:] == 5).all()


def test_teachers_and_the_slow_weights_speak_by_keys_of_their_own():
  # by one key they would say the same wherever they agree
  keys, texts_ = [], dataclasses.replace(HOW.texts, continued=2)
  how = dataclasses.replace(HOW, texts=texts_)

  def speak(params, context, prompts, key):
    keys.append(tuple(np.asarray(jax.random.key_data(key))))
    return prompts

  tools = types.SimpleNamespace(how=how, words=WORDS, speak=speak)
  cycle._texts(tools, Side(None, None), gathered(), jax.random.key(0), None)
  assert len(keys) == len(set(keys)) == 2


class After:
  """After 1 comes 2."""

  def context(self):
    return [0, 1]

  def questions(self):
    return [([0, 1], [2])]


@pytest.mark.slow
def test_dreams_go_on_in_the_slowest_receivers_newest_slot():
  dreams = DreamConfig(16, 8, 8, length=6, answer=3, rate=0.1)
  how = dataclasses.replace(HOW, dream=dreams)
  _, without = one_night()
  _, slept = sleep(how, tasks=[After()])
  m = slept.metrics
  assert m['dream_paid'] > 0 and m['dream_after'] > m['dream_before']
  assert slept.seconds['dream'] > 0 and 'dream' not in without.seconds
  assert not any(name.startswith('dream') for name in without.metrics)
  one, two = (grow.slots(tools().cfg, n.params, 1) for n in (without, slept))
  np.testing.assert_array_equal(one.b_SxRxD[:, 0], two.b_SxRxD[:, 0])
  assert (one.b_SxRxD[:, 1] != two.b_SxRxD[:, 1]).any()
  assert same(
    grow.slots(tools().cfg, without.params, 0),
    grow.slots(tools().cfg, slept.params, 0),
  )


def test_a_task_that_does_not_fit_ends_the_night_before_it_begins():
  how = dataclasses.replace(HOW, dream=DreamConfig(length=2, answer=3))
  told = []
  with pytest.raises(TaskError, match='After: a context of 2 tokens'):
    sleep(how, tell=lambda *x: told.append(x), tasks=[After()])
  assert not told


def test_a_night_that_costs_too_much_is_rolled_back_to_the_bit():
  harsh = dataclasses.replace(HOW.gate, core=0.0, day=0.99)
  made = tools()._replace(how=dataclasses.replace(HOW, gate=harsh))
  params, state = model()[1], cases.day(model()[0], 3)
  slept = cycle.night(
    made, params, state, gathered(), core(), 1, jax.random.key(0)
  )
  assert not slept.decision.accepted and slept.owners == ()
  assert slept.params is params and slept.state is state


def test_a_night_that_is_cut_short_leaves_the_model():
  class Killed(Exception):
    pass

  def tell(k, step, parts):
    if k == 0 and step == 3:
      raise Killed

  params = jax.tree.map(np.array, model()[1])
  with pytest.raises(Killed):
    sleep(tell=tell)
  assert same(params, model()[1])


def test_full_levels_end_the_night_in_words():
  _, slept = one_night()
  told = []
  with pytest.raises(SlotsError, match='period 8: all 2 expert slots'):
    sleep(params=slept.params, number=2, tell=lambda *x: told.append(x))
  # one slot is not enough for what both levels give: seen before any work
  one, _ = grow.grow(model()[0], model()[1], 1)
  with pytest.raises(SlotsError, match='period 8: all 2 expert slots'):
    sleep(params=one, tell=lambda *x: told.append(x))
  assert not told


def test_garbage_stays_in_the_fast_levels():
  day = gathered(keep=[replay.surprising(most=3.0)])
  assert day.names == ('ann',) and day.rows == (0,)
  assert gathered(only=['bob']).names == ('bob',)
  with pytest.raises(texts.NothingRead, match='nothing to consolidate'):
    gathered(keep=[lambda piece: False])


def test_texts_are_owner_by_owner_of_every_kind():
  cfg = TextsConfig(length=10, read=4, continued=2, free=2)
  day = texts.gather(cfg, 0, OWNERS, buffer())
  prompts = []

  def speak(said, key):
    prompts.append(said)
    full = jnp.full_like(said.length_B, 10)
    return said._replace(length_B=full)

  made = texts.make(cfg, 7, speak, day, jax.random.key(0))
  assert made.tokens_BxL.shape == (16, 10)
  for o in (0, 1):
    own = np.asarray(made.tokens_BxL[8 * o : 8 * o + 4])
    assert {*map(tuple, own)} == {*map(tuple, day.read[o].tokens_BxL)}
  free = np.asarray(prompts[0].tokens_BxL).reshape(2, 4, 10)[:, 2:, 0]
  assert (free == 7).all()
  drawn = texts.drawer(made, 2, 3)(jax.random.key(1))
  first = {tuple(map(int, row)) for row in made.tokens_BxL[:8]}
  assert all(tuple(map(int, row)) in first for row in drawn.tokens_BxL[:3])
  many = texts.drawer(made, 2, 100)(jax.random.key(1)).tokens_BxL[:100]
  assert {tuple(map(int, row)) for row in many} == first
