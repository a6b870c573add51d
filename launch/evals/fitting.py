"""Runs side by side as far as a device's memory goes."""

import contextlib
import logging
from collections.abc import Callable, Sequence

import jax

from nestax.launch import room
from nestax.launch.evals import sweep

SideBySide = Callable[[Sequence[float], range], list[dict]]


def by_halves(
  run: SideBySide, rates: Sequence[float], seeds: range
) -> list[dict]:
  """All runs in one program, or by halves where they do not fit in memory.

  Args:
    run: trains every rate with every seed, given both, side by side.
    rates: learning rates; they are parted first.
    seeds: of each rate.

  Returns:
    The rows of all runs.

  Raises:
    jax.errors.JaxRuntimeError: if a run does not fit alone, or for another
      failure.
  """
  many = len(rates) * len(seeds)
  try:
    return run(rates, seeds)
  except jax.errors.JaxRuntimeError as error:
    if not room.full(error) or many == 1:
      raise
  logging.getLogger(__name__).warning(
    '%d runs side by side do not fit in memory: they are done in two programs, '
    'one after the other',
    many,
  )
  # not in the handler: what failed is held there, with its arrays
  half = len(rates) // 2
  if half:
    parts = (rates[:half], seeds), (rates[half:], seeds)
  else:
    half = len(seeds) // 2
    parts = (rates, seeds[:half]), (rates, seeds[half:])
  return [row for part in parts for row in by_halves(run, *part)]


def run(task, make, rates, seeds: int, steps: int, every: int, **more):
  """`sweep.run`, by halves where its runs do not fit in memory."""

  def side_by_side(rates, some):
    return sweep.run(
      task, make, rates, some.stop, steps, every, first=some.start, **more
    )

  return by_halves(side_by_side, rates, range(seeds))


def in_words(what: str, batch: int) -> contextlib.AbstractContextManager:
  """Says what would take less, where a run does not fit alone.

  Args:
    what: is trained.
    batch: rows of a step.

  Raises:
    room.OutOfMemory: in place of the device's own error.
  """
  return room.in_words(
    lambda much: (
      f'{what}: the device has no room for a step of {batch} rows, of one run '
      f'alone{much}. Less is needed by fewer rows (train.batch), shorter ones '
      'or a narrower model, each an option of the evaluation (--set)'
    )
  )
