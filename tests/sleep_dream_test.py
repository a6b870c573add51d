"""Dreams: sampled with an extra expert, chosen, isolated, paid, imitated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.sleep import dream, grow
from nestax.sleep import reader as readers
from nestax.sleep.dream import DreamConfig, TaskError

W = 5  # words of the tables
BOS = 4
CFG = DreamConfig(
  dreams=12, top=4, random=2, length=8, answer=3, inner_rate=0.3, steps=12,
  rate=0.1,
)  # fmt: skip


@dataclasses.dataclass
class After:
  """After 0 comes 1: all that a user has to write."""

  answer: int = 1
  before: tuple = (BOS, 3)

  def context(self):
    return self.before

  def questions(self):
    return [([BOS, 0], [self.answer]), ([0], [self.answer])]


def add(params, trained):
  return params + trained


def same(params, key):
  del key
  return params


def made(cfg=CFG, disturb=same):
  return dream.programs(cfg, cases.table_reader(), add, disturb, BOS)


def table(seed=0):
  return jax.random.normal(jax.random.key(seed), (W, W)).at[:, BOS].set(-9.0)


def prompt():
  return dream.prompt_row(After(), CFG.length)


def dreams_of(programs, params=None, key=0):
  params = table() if params is None else params
  zeros = jnp.zeros((W, W))
  return programs.dream(params, None, zeros, prompt(), jax.random.key(key))


def test_a_dream_is_paid_exactly_if_it_helps():
  results = []
  zeros = jnp.zeros((W, W))
  dream.run(
    CFG, made(), table(), None, zeros, [After()], jax.random.key(0),
    lambda *told: results.append(told),
  )  # fmt: skip
  ((number, task, result),) = results
  assert (number, task) == (0, 0)
  assert len(result.scores) == CFG.kept
  np.testing.assert_array_equal(result.rewards, result.scores > result.before)
  assert 0 < result.rewards.sum() < CFG.kept  # some help, some do not


def test_imitating_what_was_paid_makes_better_dreams():
  cfg = dataclasses.replace(CFG, rounds=4, dreams=32, top=8, random=8)
  zeros = jnp.zeros((W, W))
  trained, history, after = dream.run(
    cfg, made(cfg), table(), None, zeros, [After()], jax.random.key(0)
  )
  assert len(history) == 4
  assert history[-1][0].before > history[0][0].before + 0.1
  assert (trained != 0).any()
  assert after[0] > history[-1][0].before


def test_later_dreams_are_dreamt_with_what_was_learned():
  programs = made()
  learned = 99 * jax.nn.one_hot(jnp.full(W, 2), W)  # 2 comes after everything
  said = programs.dream(table(), None, learned, prompt(), jax.random.key(0))
  assert (said.tokens_BxL[:, 2:] == 2).all()


def test_without_a_reward_nothing_is_learned():
  cfg = dataclasses.replace(CFG, margin=100.0)
  zeros = jnp.zeros((W, W))
  trained, history, after = dream.run(
    cfg, made(cfg), table(), None, zeros, [After()], jax.random.key(0)
  )
  np.testing.assert_array_equal(trained, zeros)
  assert after == (history[0][0].before,)
  assert not history[0][0].rewards.any()


def test_isolated_copies_are_those_made_one_by_one():
  programs = made()
  dreams = dreams_of(programs)
  first = 0.1 * table(1)
  got = programs.adapt(table(), None, first, dreams)
  for i in range(3):
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], dreams)
    want = programs.adapt(table(), None, first, one)[0]
    np.testing.assert_allclose(got[i], want, atol=1e-5)
  assert (got[0] != got[1]).any()


def test_dreams_are_weighed_by_their_own_gradients():
  programs = made()
  dreams = dreams_of(programs)
  zeros = jnp.zeros((W, W))
  omega = programs.weigh(table(), None, zeros, dreams)
  texts = dream.alone(dreams, BOS)
  for i in (0, 5):
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], texts)

    def loss(t, one=one):
      score = dream.row_scores(cases.table_reader(), table() + t, None, one)
      return -score[0]

    want = jnp.linalg.norm(jax.grad(loss)(zeros))
    np.testing.assert_allclose(omega[i], want, rtol=1e-4)


def test_every_dream_has_a_disturbance_of_its_own():
  def always(params, key):  # one word, a random one, after every other
    return (
      params + 99 * jax.nn.one_hot(jax.random.randint(key, (), 0, 4), W)[None]
    )

  said = dreams_of(made(disturb=always)).tokens_BxL[:, 2:]
  assert (said == said[:, :1]).all()
  assert len(np.unique(said)) > 1


def test_the_top_and_some_others_are_kept():
  omega = jnp.array([0.1, 5.0, 0.2, 4.0, 0.3, 3.0])
  seen = set()
  for i in range(20):
    chosen = np.asarray(dream.select(jax.random.key(i), omega, 2, 2)).tolist()
    assert {1, 3} <= set(chosen) and len(set(chosen)) == 4
    seen |= set(chosen)
  assert seen == set(range(6))


def test_a_dream_alone_has_left_its_context():
  texts = readers.Said(
    jnp.array([[9, 9, 1, 2, 3, 0]]), jnp.array([2]), jnp.array([5])
  )
  alone = dream.alone(texts, BOS)
  assert alone.tokens_BxL[0, :4].tolist() == [BOS, 1, 2, 3]
  assert (int(alone.start_B[0]), int(alone.length_B[0])) == (1, 4)


@functools.cache
def slotted():
  """A model with one used slot, one that is hidden and one that is empty."""
  cfg = cases.config(blocks='1', slots=3, rank=2)
  params = cases.params_of(cfg)
  for k in (0, 1):
    for index in (0, 1):
      params, _ = grow.grow(cfg, params, k)
      new = grow.take(cfg, params, k, index)
      new = new._replace(b_nxRxD=jnp.ones_like(new.b_nxRxD) * 0.1)
      params = grow.put(cfg, params, k, index, new)
    own = grow.slots(cfg, params, k)
    active = own.active_S.at[:, 1].set(0.0)
    params = grow.replace(cfg, params, k, own._replace(active_S=active))
  return cfg, params


def test_one_expert_more_is_active_in_every_block_that_has_any():
  cfg, params = slotted()
  seen = set()
  disturb = jax.jit(functools.partial(dream.random_expert, cfg))
  for i in range(12):
    other = disturb(params, jax.random.key(i))
    for k in (0, 1):
      was, now = (grow.slots(cfg, p, k) for p in (params, other))
      doubled = bool((now.b_SxRxD == 2 * was.b_SxRxD)[:, 0].all())
      shown = bool((now.active_S[:, 1] == 1).all())
      assert doubled != shown  # one of the two, never both
      assert not now.active_S[:, 2].any()  # the empty one stays out
      seen.add(doubled)
    kernels = [p['blocks']['level_0']['down'] for p in (other, params)]
    np.testing.assert_array_equal(*kernels)
  assert seen == {True, False}


def test_where_all_slots_are_empty_nothing_is_added():
  cfg = cases.config(blocks='1', slots=3, rank=2)
  params = cases.params_of(cfg)
  other = dream.random_expert(cfg, params, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, other)


def test_a_model_dreams_in_a_slot_of_its_own():
  cfg, params = slotted()
  params, index = grow.grow(cfg, params, 1)
  how = dataclasses.replace(CFG, dreams=4, top=1, random=1, inner_steps=2)

  def put(params, new):
    return grow.put(cfg, params, 1, index, new)

  programs = dream.programs(
    how,
    readers.of_model(cfg),
    put,
    functools.partial(dream.random_expert, cfg),
    bos=BOS,
  )
  first = grow.take(cfg, params, 1, index)
  _, ((result,),), _ = dream.run(
    how, programs, params, None, first, [After()], jax.random.key(0)
  )
  assert np.isfinite(result.scores).all()
  assert (result.scores != result.before).all()


class Empty(After):
  def questions(self):
    return []


@pytest.mark.parametrize(
  'tasks, words',
  [
    ([], 'no tasks'),
    ([Empty()], 'Empty: no questions'),
    ([After(before=())], 'a context of 0 tokens'),
    ([After(before=(1,) * 8)], 'a context of 8 tokens; from 1 to 7'),
  ],
  ids=['none', 'unasked', 'no context', 'no room'],
)
def test_tasks_that_cannot_be_dreamt_about_are_refused(tasks, words):
  with pytest.raises(TaskError, match=words):
    dream.run(CFG, None, None, None, None, tasks, jax.random.key(0))


def test_an_answer_that_is_too_long_is_refused():
  with pytest.raises(TaskError, match='question 0 has 2 and its answer 1'):
    dream.question_rows(After(), 2, 2)


@pytest.mark.parametrize(
  'values, words',
  [
    ({'dreams': 3}, 'top=4 and random=2'),
    ({'rounds': 0}, 'rounds=0'),
    ({'temperature': 0.0}, 'temperature=0.0'),
    ({'margin': float('nan')}, 'margin=nan'),
  ],
  ids=['few', 'rounds', 'temperature', 'margin'],
)
def test_impossible_settings_are_refused_in_words(values, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(CFG, **values)
