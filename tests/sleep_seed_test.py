"""Knowledge Seeding on tables of logits, where everything can be counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases
from sleep_cases import W, table

from nestax.sleep import distributions, gate, seed
from nestax.sleep import reader as readers
from nestax.sleep.objective import SeedConfig, Side

QUICK = SeedConfig(steps=60, rate=0.1, rows=16)


def add(params, trained):
  return params + trained


def teach(cfg, L=8):
  """Teaches a flat table another one; (first, last) mean KL of their rows."""
  reader, target = cases.table_reader(), table(0)
  teacher, student = Side(target, None), Side(jnp.zeros((W, W)), None)
  made = seed.programs(cfg, reader, add)

  @jax.jit
  def draw(key):
    first, key = jax.random.split(key)
    tokens = jax.random.randint(first, (cfg.rows, L), 0, W)
    ones = jnp.ones((cfg.rows,), jnp.int32)
    prompts = readers.Said(tokens, ones, ones)
    return readers.sample(reader, target, None, prompts, key)

  rewards = []
  trained, parts = seed.run(
    cfg,
    made,
    teacher,
    student,
    jnp.zeros((W, W)),
    draw,
    jax.random.key(1),
    lambda step, parts: rewards.append(float(parts.get('reward', 0))),
  )
  apart = lambda x: distributions.divergence('forward_kl', target, x).mean()  # noqa: E731
  return apart(jnp.zeros((W, W))), apart(trained), rewards, parts


@pytest.mark.parametrize(
  'name, on_policy', [('forward_kl', 0.0), ('jsd', 0.5), ('reverse_kl', 1.0)]
)
def test_the_student_comes_to_speak_as_the_teacher(name, on_policy):
  cfg = dataclasses.replace(
    QUICK, alpha=1.0, on_policy=on_policy, divergence=name
  )
  first, last, _, parts = teach(cfg)
  assert last < 0.15 * first
  assert ('divergence' in parts) == (on_policy < 1)
  assert ('on_policy_divergence' in parts) == (on_policy > 0)


def test_reward_alone_is_followed():
  _, _, rewards, _ = teach(dataclasses.replace(QUICK, alpha=0.0))
  assert np.mean(rewards[-10:]) > np.mean(rewards[:5]) + 0.1


def test_divergence_and_reward_together():
  first, last, rewards, _ = teach(QUICK)
  assert last < 0.5 * first
  assert np.mean(rewards[-10:]) > np.mean(rewards[:5])


def test_who_may_say_little_is_compared_with_as_little():
  cfg = SeedConfig(alpha=1.0, gamma=0.25, group=1, say=2)
  tokens, two = jnp.array([[0, 1, 2, 3, 1, 2]]), jnp.array([2])
  prefixes = readers.Said(tokens, two, 3 * two)
  said = readers.Said(tokens, two, 2 * two)  # right, as far as it goes
  hear = seed.hearing(cfg, cases.table_reader())
  heard = hear(Side(table(0), None), prefixes, prefixes, said)
  # each of the two words was the teacher's first choice, or was not
  best_W = np.asarray(table(0)).argmax(1)
  sem = np.mean([best_W[1] == 2, best_W[2] == 3])
  np.testing.assert_allclose(heard.reward_B, 0.25 * sem + 0.75)

  def own(logits, tokens, mask):  # a reward of meaning that a user brings
    return jnp.where(mask, tokens, 0).sum(1) / 10

  hear = seed.hearing(cfg, cases.table_reader(), own)
  heard = hear(Side(table(0), None), prefixes, prefixes, said)
  np.testing.assert_allclose(heard.reward_B, 0.25 * 0.5 + 0.75)


def test_prefixes_keep_the_prompt_and_leave_something_to_say():
  B = 500
  start = jnp.array([1, 3] * (B // 2))
  length = jnp.array([6, 4] * (B // 2))
  texts = readers.Said(cases.tokens(B, 8), start, length)
  prefixes = seed.cut(jax.random.key(0), texts, 3)
  cut = np.asarray(prefixes.start_B).reshape(B, 3)
  assert (cut >= np.asarray(start)[:, None]).all()
  assert (cut < np.asarray(length)[:, None]).all()
  assert set(cut[0::2].ravel()) == {1, 2, 3, 4, 5}  # every place is drawn
  assert (cut == cut[:, :1]).all()  # a group goes on from one prefix


def test_completions_are_moved_to_the_left():
  texts = readers.Said(
    jnp.array([[5, 6, 7, 8], [5, 6, 0, 0]]),
    jnp.array([2, 1]),
    jnp.array([4, 2]),
  )
  tokens, length = seed.completion(texts)
  np.testing.assert_array_equal(length, [2, 1])
  np.testing.assert_array_equal(tokens[0, :2], [7, 8])
  np.testing.assert_array_equal(tokens[1, :1], [6])


def test_a_student_that_forgets_a_level_learns_it_back():
  # the slow weights of level 1 take up what level 0 had written
  cfg = cases.config(blocks='1')
  params = cases.params_of(cfg)
  reader = readers.of_model(cfg)
  context = readers.learned(cases.day(cfg, 2))
  reset = (jax.tree.map(jnp.zeros_like, context[0]), context[1])
  how = SeedConfig(steps=30, rate=0.02, rows=4, alpha=1.0, on_policy=0.0)

  def put(params, down):
    level = params['blocks']['level_1'] | {'down': down}
    return params | {'blocks': params['blocks'] | {'level_1': level}}

  tokens = cases.tokens(8, 10)
  texts = readers.Said(tokens, jnp.full(8, 1), jnp.full(8, 10))
  numbers = []
  trained, _ = seed.run(
    how,
    seed.programs(how, reader, put),
    Side(params, context),
    Side(params, reset),
    params['blocks']['level_1']['down'],
    lambda key: texts,
    jax.random.key(0),
    lambda step, parts: numbers.append(float(parts['divergence'])),
  )
  assert numbers[-1] < 0.7 * numbers[0]
  assert (trained != params['blocks']['level_1']['down']).any()


def test_an_update_is_compiled_once_wherever_the_model_was_put():
  cfg = dataclasses.replace(QUICK, steps=3, rows=4)
  reader, before = cases.table_reader(), readers._score._cache_size()
  made = seed.programs(cfg, reader, add)
  texts = readers.Said(cases.tokens(4, 8) % W, jnp.ones(4, int), jnp.full(4, 8))
  put = lambda x: jax.device_put(x, jax.devices()[0])  # noqa: E731
  teacher, student = (Side(put(table(i)), None) for i in (0, 1))
  trained = put(jnp.zeros((W, W)))
  key = jax.random.key(0)
  draw = lambda key: texts  # noqa: E731
  seed.run(cfg, made, teacher, student, trained, draw, key, keep=draw)
  for program in (made.speak, made.begin, made.learn):
    assert program._cache_size() == 1
  # of the teacher's texts, the student's, those that are kept, and the gate's
  gate.loss(reader, teacher.params, None, *texts[::2], rows=4)
  assert readers._score._cache_size() == before + 1


@pytest.mark.parametrize('keep, kept', [(0.0, True), (5.0, True), (5.0, False)])
def test_what_is_kept_stays_as_the_slow_weights_had_it(keep, kept):
  # word 3 is never in the teacher's texts: there the student is free, and is
  # held to the teacher's slow weights where texts are kept
  reader, target, flat = cases.table_reader(), table(0), jnp.zeros((W, W))
  texts = readers.Said(
    jnp.tile(jnp.array([[0, 1, 2, 0, 1, 2]]), (4, 1)),
    jnp.ones(4, int),
    jnp.full(4, 6),
  )
  held = readers.Said(jnp.full((4, 6), 3), jnp.ones(4, int), jnp.full(4, 6))
  cfg = dataclasses.replace(QUICK, alpha=1.0, on_policy=0.0, rows=4, keep=keep)
  drift = flat.at[3].set(jnp.array([2.0, 0.0, 0.0, 0.0]))
  trained, parts = seed.run(
    cfg,
    seed.programs(cfg, reader, add),
    Side(target, None),
    Side(flat, None),
    drift,
    lambda key: texts,
    jax.random.key(0),
    keep=(lambda key: held) if kept else None,
  )
  assert ('kept' in parts) == bool(keep and kept)
  moved = float(distributions.divergence('forward_kl', target, trained)[3])
  first = float(distributions.divergence('forward_kl', target, drift)[3])
  assert moved < 0.1 * first if keep and kept else moved == first


def test_what_is_kept_is_what_the_slow_weights_and_the_students_levels_say():
  # else a slot would learn from kept texts, too, what the day has written
  cfg = dataclasses.replace(QUICK, steps=1, rows=4, alpha=1.0, on_policy=0.0)
  reader, heard = cases.knowing_reader(), []
  knows, left = (x * jnp.arange(1.0, 1 + W)[None] for x in (1, -1))
  texts, kept = (
    readers.Said(cases.tokens(4, 8, i) % W, jnp.ones(4, int), jnp.full(4, 8))
    for i in (0, 1)
  )
  made = seed.programs(cfg, reader, add)
  seed.run(
    cfg,
    made._replace(hear=lambda *x: heard.append(made.hear(*x)) or heard[0]),
    Side(table(0), knows),
    Side(table(1), left),
    jnp.zeros((W, W)),
    lambda key: texts,
    jax.random.key(0),
    keep=lambda key: kept,
  )
  for rows, context, got in (
    (texts, knows, heard[0].texts_BxLxV),
    (kept, left, heard[0].kept_BxLxV),
  ):
    want = readers.score(reader, table(0), context, rows.tokens_BxL)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('on_policy', [0.5, 1.0])
def test_the_student_speaks_in_every_nth_update_and_is_cut_off(on_policy):
  cfg = QUICK
  cfg = dataclasses.replace(cfg, steps=7, every=3, say=2, on_policy=on_policy)
  reader, spoken, numbers = cases.table_reader(), [], []
  made = seed.programs(cfg, reader, add)

  def speak(*args):
    prefixes, said = made.speak(*args)
    spoken.append(int((said.length_B - prefixes.start_B).max()))
    return prefixes, said

  seed.run(
    cfg,
    made._replace(speak=speak),
    Side(table(0), None),
    Side(jnp.zeros((W, W)), None),
    jnp.zeros((W, W)),
    lambda key: readers.Said(
      jax.random.randint(key, (16, 8), 0, W), jnp.ones(16, int), jnp.full(16, 8)
    ),
    jax.random.key(0),
    lambda step, parts: numbers.append('reward' in parts),
  )
  assert numbers == [True, False, False, True, False, False, True]
  assert spoken == [2, 2, 2]


def test_all_that_is_drawn_in_an_update_is_drawn_by_a_key_of_its_own():
  cfg = dataclasses.replace(QUICK, steps=2)
  made, keys = seed.programs(cfg, cases.table_reader(), add), []

  def noted(key):
    keys.append(tuple(np.asarray(jax.random.key_data(key))))
    return key

  def draw(key):
    tokens = jax.random.randint(noted(key), (4, 8), 0, W)
    return readers.Said(tokens, jnp.ones(4, int), jnp.full(4, 8))

  seed.run(
    cfg,
    made._replace(speak=lambda *x: made.speak(*x[:-1], noted(x[-1]))),
    *(Side(table(0), None), Side(jnp.zeros((W, W)), None)),
    jnp.zeros((W, W)),
    draw,
    jax.random.key(0),
    keep=draw,
  )
  assert len(keys) == len(set(keys)) == 6


def test_the_rate_falls_evenly_to_a_share_of_the_first():
  cfg = SeedConfig(steps=5, rate=0.8, last=0.25)
  tx, ones = seed.optimizer(cfg), jnp.ones(3)
  state, moved = tx.init(ones), []
  for _ in range(cfg.steps):
    updates, state = tx.update(ones, state)  # Adam moves by the rate itself
    moved.append(-float(updates[0]))
  np.testing.assert_allclose(moved, [0.8, 0.65, 0.5, 0.35, 0.2], rtol=1e-5)
  once = seed.optimizer(SeedConfig(steps=1, rate=0.8, last=0.0))
  updates, _ = once.update(ones, once.init(ones))
  np.testing.assert_allclose(updates, -0.8, rtol=1e-5)
