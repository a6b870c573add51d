"""What a night is given: refused in words, before anything is done.

An index beyond a state is moved to its end by JAX, and an id beyond the
vocabulary read as NaN, so that a night would go on with another owner's
levels, or learn nothing and say so nowhere.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from nestax.models import border
from nestax.models.config import ModelConfig
from nestax.sleep.reader import Said
from nestax.sleep.task import Task, TaskError
from nestax.sleep.texts import Day, Words


def words(cfg: ModelConfig, these: Words) -> None:
  """Refuses ids with a meaning that the vocabulary does not have.

  Raises:
    ValueError: naming the id, or the shape of those allowed.
  """
  for name, least in (('bos', 0), ('eos', -1), ('pad', 0)):
    token = getattr(these, name)
    if not least <= token < cfg.V:
      raise ValueError(
        f'{name}={token}: the vocabulary has V={cfg.V}, ids from {least} to '
        f'{cfg.V - 1}'
      )
  allowed = these.allowed_V
  if allowed is None:
    return
  shape, dtype = np.shape(allowed), getattr(allowed, 'dtype', None)
  if shape != (cfg.V,) or dtype != np.bool_ or not np.any(allowed):
    raise ValueError(
      f'allowed_V of the shape {shape} and type {dtype}: ({cfg.V},) and bool '
      'are wanted, True for ids that may be said, one at least'
    )


def night(
  cfg: ModelConfig,
  params,
  state,
  day: Day,
  core: Said,
  number: int,
  past: Said | None,
) -> None:
  """Refuses what a night cannot go by.

  Arguments are those of `cycle.night`.

  Raises:
    ValueError: saying what it is and what is wanted.
  """
  border.bare(params)
  if getattr(state, 'levels', None) is None:
    raise ValueError(
      f'state: a {type(state).__name__} without levels; the state of the '
      'sequences that have read is wanted'
    )
  if number < 1:
    raise ValueError(f'number={number}: nights are counted from 1')
  _owners(day, state.levels.clock_B.shape[0])
  for name, said in zip(day.names, day.read, strict=True):
    _texts(f'the day of {name!r}', said, cfg.V)
  _texts('core', core, cfg.V)
  if past is not None:
    _texts('past', past, cfg.V)


def tasks(cfg: ModelConfig, these: Sequence[Task]) -> None:
  """Raises a TaskError for ids that the vocabulary does not have."""
  for i, task in enumerate(these):
    parts = [list(task.context())]
    parts += [list(part) for pair in task.questions() for part in pair]
    for token in (token for part in parts for token in part):
      if not 0 <= token < cfg.V:
        name = getattr(task, 'name', type(task).__name__)
        raise TaskError(
          f'{name}: token id {token} in task {i}; the vocabulary has '
          f'V={cfg.V}, ids from 0 to {cfg.V - 1}'
        )


def _owners(day: Day, B: int) -> None:
  if not day.rows:
    raise ValueError('day: no owners, so there is nothing to sleep on')
  if not len(day.rows) == len(day.names) == len(day.read):
    counts = len(day.rows), len(day.names), len(day.read)
    raise ValueError(f'day: {counts} rows, names and texts; one of each')
  if wrong := [row for row in day.rows if not 0 <= row < B]:
    raise ValueError(
      f'day: row {wrong[0]} of a state of {B} sequences: from 0 to {B - 1}'
    )
  if len(set(day.rows)) < len(day.rows):
    raise ValueError(f'day: rows {day.rows}, one of them twice')


def _texts(what: str, said: Said, V: int) -> None:
  if not isinstance(said, Said):
    raise ValueError(
      f'{what}: a {type(said).__name__}; a Said(tokens_BxL, start_B, length_B) '
      'is wanted'
    )
  ids = np.asarray(said.tokens_BxL)
  if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(
      f'{what}: tokens of the shape {ids.shape} and type {ids.dtype}; [B, L] '
      'of whole numbers are wanted'
    )
  length = np.asarray(said.length_B)
  if length.shape != ids.shape[:1] or not (length <= ids.shape[1]).all():
    raise ValueError(
      f'{what}: length_B={length}; one a row of {ids.shape[0]} is wanted, at '
      f'most {ids.shape[1]}'
    )
  border.in_vocabulary(V, ids, f'{what}: ')
