"""Work in steps, so that several pieces of it can be written down in turn.

A compiler for one long basic block schedules near the order in which it is
given its operations. The steps of two heads, which know nothing of each other,
side by side in that order hide each other's latencies. A generator yields
where a step ends; what it returns is its result.
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar('T')


def last(steps: Generator[None, None, T]) -> T:
  """Takes all steps of one piece of work; returns its result."""
  (result,) = in_turn([steps])
  return result


def in_turn(pieces: Sequence[Generator[None, None, T]]) -> list[T]:
  """Takes one step of each piece after the other; returns their results."""
  steps = beside(*pieces)
  while True:
    try:
      next(steps)
    except StopIteration as end:
      return end.value


def beside(*pieces: Generator) -> Generator[None, None, list]:
  """The same as steps of one piece of work: one of each piece at a time."""
  results = {}
  while True:
    for i, steps in enumerate(pieces):
      if i in results:
        continue
      try:
        next(steps)
      except StopIteration as end:
        results[i] = end.value
    if len(results) == len(pieces):
      return [results[i] for i in range(len(pieces))]
    yield


def one_by_one(*pieces: Generator) -> Generator[None, None, list]:
  """All steps of a piece before those of the next: fewer values at a time."""
  results = []
  for steps in pieces:
    results.append((yield from steps))
    yield
  return results
