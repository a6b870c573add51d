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
  results: dict[int, T] = {}
  while len(results) < len(pieces):
    for i, steps in enumerate(pieces):
      if i in results:
        continue
      try:
        next(steps)
      except StopIteration as end:
        results[i] = end.value
  return [results[i] for i in range(len(pieces))]
