"""Dreams are chosen, paid if they help, and imitated."""

import dataclasses
import functools

import dream_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.sleep import dream, grow, rounds
from nestax.sleep import reader as readers
from nestax.sleep.task import TaskError


def dreamt(tell=None, **options):
  cfg = dataclasses.replace(cases.CFG, **options)
  zeros, key = jnp.zeros((cases.W, cases.W)), jax.random.key(0)
  args = cfg, cases.made(cfg), cases.table(), None, zeros, [cases.After()], key
  return rounds.run(*args, tell)


def test_a_dream_is_paid_exactly_if_it_helps():
  results = []
  dreamt(lambda *told: results.append(told))
  ((number, task, result),) = results
  assert (number, task) == (0, 0)
  assert len(result.scores) == cases.CFG.kept
  np.testing.assert_array_equal(result.rewards, result.scores > result.before)
  assert 0 < result.rewards.sum() < cases.CFG.kept  # some help, some do not


def test_imitating_what_was_paid_makes_better_dreams():
  trained, history, after = dreamt(rounds=4, dreams=32, top=8, random=8)
  assert len(history) == 4
  assert history[-1][0].before > history[0][0].before + 0.1
  assert (trained != 0).any()
  assert after[0] > history[-1][0].before


def test_without_a_reward_nothing_is_learned():
  trained, history, after = dreamt(margin=100.0)
  assert not trained.any()
  assert after == (history[0][0].before,)
  assert not history[0][0].rewards.any()


def test_the_top_and_some_others_are_kept():
  omega = jnp.array([0.1, 5.0, 0.2, 4.0, 0.3, 3.0])
  seen = set()
  for i in range(20):
    chosen = np.asarray(rounds.select(jax.random.key(i), omega, 2, 2)).tolist()
    assert {1, 3} <= set(chosen) and len(set(chosen)) == 4
    seen |= set(chosen)
  assert seen == set(range(6))


def test_without_selection_all_are_kept_alike_whatever_they_weigh():
  omega = jnp.array([0.1, 5.0, 0.2, 4.0, 0.3, 3.0])
  keys = jax.random.split(jax.random.key(0), 300)
  chosen = jax.vmap(lambda key: rounds.select(key, omega, 0, 2))(keys)
  count = np.bincount(np.asarray(chosen).ravel(), minlength=6)
  assert count.sum() == 600 and count.min() > 70 and count.max() < 130


def test_what_weighs_most_is_what_is_learned():
  cfg = dataclasses.replace(cases.CFG, top=2, random=0)
  tokens = jnp.full((12, 8), 1).at[:, 2].set(jnp.arange(12) % 4)
  dreams = readers.Said(tokens, jnp.full(12, 2), jnp.arange(12) % 6 + 3)
  omega, seen = jnp.zeros(12).at[jnp.array([4, 7])].set(1.0), []
  real = cases.made(cfg)
  programs = real._replace(
    dream=lambda *args: dreams,
    weigh=lambda *args: omega,
    adapt=lambda *args: seen.append(args[-1]) or real.adapt(*args),
  )
  zeros, key = jnp.zeros((cases.W, cases.W)), jax.random.key(0)
  args = cases.table(), None, zeros, [cases.After()], key
  rounds.run(cfg, programs, *args)
  assert seen[0].length_B.tolist() == [7, 4]


def test_a_model_dreams_in_a_slot_of_its_own():
  cfg, params = cases.slotted()
  params, index = grow.grow(cfg, params, 1)
  how = dataclasses.replace(cases.CFG, dreams=4, top=1, random=1, inner_steps=2)

  def put(params, new):
    return grow.put(cfg, params, 1, index, new)

  programs = dream.programs(
    how,
    readers.of_model(cfg),
    put,
    functools.partial(dream.random_expert, cfg),
    bos=cases.BOS,
  )
  first = grow.take(cfg, params, 1, index)
  _, ((result,),), _ = rounds.run(
    how, programs, params, None, first, [cases.After()], jax.random.key(0)
  )
  assert np.isfinite(result.scores).all()
  assert (result.scores != result.before).all()


class Many(cases.After):
  def questions(self):
    return 2 * super().questions()


def test_every_task_and_round_is_dreamt_anew_and_what_was_paid_is_studied():
  cfg = dataclasses.replace(cases.CFG, rounds=2)
  real, keys, studied = cases.made(cfg), [], []
  programs = real._replace(
    dream=lambda *args: keys.append(args[-1]) or real.dream(*args),
    # all but the first helps
    examine=lambda *args: jnp.arange(1.0, 1 + len(args[2])),
    study=lambda *args: studied.append(args[-1]) or real.study(*args),
  )
  zeros, tasks = jnp.zeros((cases.W, cases.W)), [cases.After(), Many()]
  args = cases.table(), None, zeros, tasks, jax.random.key(0)
  rounds.run(cfg, programs, *args)
  assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4
  assert len(studied) == cfg.rounds * cfg.steps
  assert all(paid.shape == (2 * cfg.kept,) for paid in studied)
  # as many rows of each, so that one program examines all
  rows = [len(asked.length_B) for _, asked, _ in rounds.prepare(cfg, tasks)]
  assert rows == [4, 4]


class Empty(cases.After):
  def questions(self):
    return []


@pytest.mark.parametrize(
  'tasks, words',
  [
    ([], 'no tasks'),
    ([Empty()], 'Empty: no questions'),
    ([cases.After(before=())], 'a context of 0 tokens'),
    ([cases.After(before=(1,) * 8)], 'a context of 8 tokens; from 1 to 7'),
  ],
  ids=['none', 'unasked', 'no context', 'no room'],
)
def test_tasks_that_cannot_be_dreamt_about_are_refused(tasks, words):
  with pytest.raises(TaskError, match=words):
    rounds.run(cases.CFG, None, None, None, None, tasks, jax.random.key(0))
