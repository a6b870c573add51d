"""Runs side by side as far as a device's memory goes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax

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
  try:
    return run(rates, seeds)
  except jax.errors.JaxRuntimeError as error:
    if not _full(error) or len(rates) * len(seeds) == 1:
      raise
  # not in the handler: what failed is held there, with its arrays
  half = len(rates) // 2
  if half:
    parts = (rates[:half], seeds), (rates[half:], seeds)
  else:
    half = len(seeds) // 2
    parts = (rates, seeds[:half]), (rates, seeds[half:])
  return [row for part in parts for row in by_halves(run, *part)]


@contextlib.contextmanager
def in_words(task: str, batch: int) -> Iterator[None]:
  """Says what would take less memory, where a run does not fit alone.

  Args:
    task: what is trained.
    batch: rows of a step.

  Raises:
    MemoryError: in place of the device's own error.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not _full(error):
      raise
    raise MemoryError(
      f'{task}: the device has no room for a step of {batch} rows, of one run '
      'alone. Less is needed by fewer rows (train.batch), shorter ones or a '
      'narrower model (train.D), each an option of the evaluation (--set)'
    ) from error


def _full(error: jax.errors.JaxRuntimeError) -> bool:
  return 'RESOURCE_EXHAUSTED' in str(error)
