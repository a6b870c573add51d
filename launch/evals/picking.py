"""Which evaluation of a run counts, and which learning rate of a cell."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
  """Which evaluation of a run counts, and when a run has ended.

  Attributes:
    best: the one whose `valid` ('valid') or `loss` ('loss') is best, of equal
      ones that of the better other; '': the last one.
    enough: a run ends once `valid` is no less; 0: not asked.
    patience: a run ends after so many evaluations that were not better than
      the best before; 0: never so.
  """

  best: str = ''
  enough: float = 0.0
  patience: int = 0

  def score(self, run: Sequence[dict]) -> dict:
    """The row that counts; those after a run's end do not."""
    best, end, _ = self._follow(run)
    return run[best if self.best else end]

  def lived(self, run: Sequence[dict]) -> Sequence[dict]:
    """A run's rows until its end, whatever others beside it went on to."""
    return run[: self._follow(run)[1] + 1]

  def ended(self, run: Sequence[dict]) -> bool:
    """Whether a run is over before its last step."""
    return self._follow(run)[2]

  def _follow(self, run) -> tuple[int, int, bool]:
    """Where a run was best and where it ended, and whether it did."""
    best = 0
    for i, row in enumerate(run):
      if self._worth(row) > self._worth(run[best]):
        best = i
      tired = self.patience and i - best >= self.patience
      if tired or (self.enough and _number(row, 'valid') >= self.enough):
        return best, i, True
    return best, len(run) - 1, False

  def _worth(self, row: dict) -> tuple[float, float]:
    """Larger for the better evaluation."""
    worth = _number(row, 'valid'), _number(row, 'loss', -1)
    return worth[::-1] if self.best == 'loss' else worth


def scored(rows: Sequence[dict], rule: Rule) -> list[dict]:
  """Gives of every run the evaluation that counts.

  Args:
    rows: of all runs in the order of steps, with `rate`, `seed`, `valid` and
      `loss`; None for what is not finite.
    rule: which one that is.
  """
  return [rule.score(run) for run in by_run(rows).values()]


def by_run(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
  """The rows of each rate and seed."""
  runs: dict[tuple, list[dict]] = {}
  for row in rows:
    runs.setdefault((row['rate'], row['seed']), []).append(row)
  return runs


def all_ended(rows: Sequence[dict], rule: Rule) -> bool:
  """Whether every run is over before its last step."""
  return all(rule.ended(run) for run in by_run(rows).values())


def _number(row: dict, name: str, sign: int = 1) -> float:
  return -math.inf if row[name] is None else sign * row[name]


def pick(scored: Sequence[dict], rates: Sequence[float]):
  """The rate of the best mean score, of equal ones that of the lowest loss."""

  def mean(rate, name, bad):
    values = [row[name] for row in scored if row['rate'] == rate]
    return float(np.mean([bad if v is None else v for v in values]))

  def worth(rate):
    return mean(rate, 'valid', -math.inf), -mean(rate, 'loss', math.inf)

  means = {f'{rate:g}': mean(rate, 'valid', -math.inf) for rate in rates}
  means = {k: v if math.isfinite(v) else None for k, v in means.items()}
  return max(rates, key=worth), means
