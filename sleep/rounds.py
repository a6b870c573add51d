"""Rounds of dreaming: which dreams are kept, paid and imitated (ReST-EM)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.sleep.dream import DreamConfig, Programs
from nestax.sleep.task import Task, TaskError, prompt_row, question_rows


class Result(NamedTuple):
  """What became of one task in one round."""

  before: float  # score without any dream
  scores: np.ndarray  # with each dream that was kept
  chosen: np.ndarray  # which of the dreams those were
  rewards: np.ndarray  # 0 or 1 each


class Dreamt(NamedTuple):
  """What a night's dreams came to."""

  trained: Any  # what was learned from those that were paid
  rounds: tuple[list[Result], ...]  # each of them task by task
  after: tuple[float, ...]  # each task's score with `trained`


def select(key, omega_m, top: int, random: int):
  """Indices of the `top` largest and of `random` others, in no order."""
  order_m = jnp.argsort(-omega_m)
  rest = jax.random.permutation(key, order_m[top:])
  return jnp.concatenate([order_m[:top], rest[:random]])


def prepare(cfg: DreamConfig, tasks: Sequence[Task]):
  """Each task's prompt, its questions as rows, and how many there are.

  Raises:
    TaskError: for no tasks, or one that does not fit.
  """
  if not tasks:
    raise TaskError('no tasks to dream about')
  most = max(len(task.questions()) for task in tasks)
  return [
    (prompt_row(t, cfg.length), *question_rows(t, cfg.answer, most))
    for t in tasks
  ]


def run(
  cfg: DreamConfig,
  made: Programs,
  params,
  context,
  trained,
  tasks: Sequence[Task],
  key,
  tell: Callable[[int, int, Result], None] | None = None,
):
  """Dreams about every task, and imitates the dreams that helped.

  Args:
    cfg: how to dream.
    made: from `dream.programs`.
    params: of the model, without what is trained.
    context: what the rows know, of one owner, see `reader.Reader`; or None.
    trained: first value of what is trained.
    tasks: what to dream about.
    key: of all that is random.
    tell: given the round, the task's number and its result.

  Returns:
    Dreamt. Without a single reward `trained` is as it was.

  Raises:
    TaskError: for no tasks, or one that does not fit, before anything is done.
  """
  ready = prepare(cfg, tasks)
  history = []
  for number in range(cfg.rounds):
    kept, paid, results = [], [], []
    for i, (prompt, questions, count) in enumerate(ready):
      own = jax.random.fold_in(jax.random.fold_in(key, number), i)
      dreams, result = _one_task(
        cfg, made, (params, context, trained), prompt, questions, count, own
      )
      kept.append(dreams)
      paid.append(result.rewards)
      results.append(result)
      if tell:
        tell(number, i, result)
    history.append(results)
    paid = np.concatenate(paid)
    if paid.any():
      texts = jax.tree.map(lambda *x: jnp.concatenate(x), *kept)
      trained = _imitate(cfg, made, params, context, trained, texts, paid)
  own = jax.tree.map(lambda x: x[None], trained)
  after = tuple(
    float(made.examine(params, context, own, questions, count)[0])
    for _, questions, count in ready
  )
  return Dreamt(trained, tuple(history), after)


def _one_task(cfg, made, model, prompt, questions, count, key):
  params, context, trained = model
  dream_key, select_key = jax.random.split(key)
  dreams = made.dream(params, context, trained, prompt, dream_key)
  omega_m = made.weigh(params, context, trained, dreams)
  chosen = select(select_key, omega_m, cfg.top, cfg.random)
  dreams = jax.tree.map(lambda x: x[chosen], dreams)
  copies = made.adapt(params, context, trained, dreams)
  awake = jax.tree.map(lambda x: x[None], trained)
  before = made.examine(params, context, awake, questions, count)[0]
  after = np.asarray(made.examine(params, context, copies, questions, count))
  # a copy whose score is not a number has not helped
  rewards = (after > float(before) + cfg.margin).astype(np.float32)
  return dreams, Result(float(before), after, np.asarray(chosen), rewards)


def _imitate(cfg, made, params, context, trained, texts, paid):
  """Fine-tunes on the paid dreams after their contexts (ReST-EM)."""
  opt_state = made.begin(trained)
  paid_B = jnp.asarray(paid)
  for _ in range(cfg.steps):
    trained, opt_state = made.study(
      params, context, trained, opt_state, texts, paid_B
    )
  return trained
