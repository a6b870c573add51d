"""What a user writes to have a model dream, as rows of tokens."""

from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from nestax.sleep.reader import Said

Tokens = Sequence[int]


class Task(Protocol):
  """What a user writes to have a model dream about something."""

  def context(self) -> Tokens:
    """What is read before a dream."""

  def questions(self) -> Sequence[tuple[Tokens, Tokens]]:
    """Pairs of a prompt and its right answer: a dream must help with them."""


class TaskError(ValueError):
  """A task does not fit the rows that dreams are made in."""


def prompt_row(task: Task, length: int) -> Said:
  """A task's context as one row with room for a dream.

  Raises:
    TaskError: if there is no context, or no room.
  """
  tokens = list(task.context())
  if not 1 <= len(tokens) < length:
    raise TaskError(
      f'{_name(task)}: a context of {len(tokens)} tokens; from 1 to '
      f'{length - 1} leave room for a dream in rows of length={length}'
    )
  row = np.zeros((1, length), np.int32)
  row[0, : len(tokens)] = tokens
  start = jnp.array([len(tokens)], jnp.int32)
  return Said(jnp.asarray(row), start, start)


def question_rows(task: Task, answer: int, rows: int) -> tuple[Said, int]:
  """A task's questions as rows, and how many there are.

  Args:
    task: with 1 to `rows` questions.
    answer: tokens a row.
    rows: how many to make, the last ones empty.

  Raises:
    TaskError: if there are none, or one that is empty or too long.
  """
  pairs = [(list(q), list(a)) for q, a in task.questions()]
  if not pairs:
    raise TaskError(f'{_name(task)}: no questions, so no dream could help')
  tokens = np.zeros((rows, answer), np.int32)
  start, length = np.ones(rows, np.int32), np.ones(rows, np.int32)
  for i, (q, a) in enumerate(pairs):
    if not q or not a or len(q) + len(a) > answer:
      raise TaskError(
        f'{_name(task)}: question {i} has {len(q)} and its answer {len(a)} '
        f'tokens; at least one each, and together at most answer={answer}'
      )
    tokens[i, : len(q) + len(a)] = q + a
    start[i], length[i] = len(q), len(q) + len(a)
  return Said(*map(jnp.asarray, (tokens, start, length))), len(pairs)


def _name(task) -> str:
  return getattr(task, 'name', type(task).__name__)
