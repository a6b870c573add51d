"""Which evaluation of a run counts, and which learning rate of a cell."""

import math
from collections.abc import Sequence

import numpy as np


def scored(rows: Sequence[dict], best: bool, enough: float = 0.0) -> list[dict]:
  """Gives of every run the evaluation that counts.

  Args:
    rows: of all runs in the order of steps, with `rate`, `seed`, `valid` and
      `loss`; None for what is not finite.
    best: that whose `valid` is best, of equal ones that of the lowest loss;
      False: the last one.
    enough: the first one whose `valid` is no less, if any is; 0: not asked.
  """
  runs = by_run(rows).values()
  return [
    next(
      (row for row in run if reached(row, enough)),
      max(run, key=_worth) if best else run[-1],
    )
    for run in runs
  ]


def by_run(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
  """The rows of each rate and seed."""
  runs: dict[tuple, list[dict]] = {}
  for row in rows:
    runs.setdefault((row['rate'], row['seed']), []).append(row)
  return runs


def reached(row: dict, enough: float) -> bool:
  """Whether `valid` is `enough` in a row; never if that is 0."""
  return bool(enough) and row['valid'] is not None and row['valid'] >= enough


def all_reached(rows: Sequence[dict], enough: float) -> bool:
  """Whether every run has been there."""
  runs = by_run(rows).values()
  return all(any(reached(row, enough) for row in run) for run in runs)


def _worth(row):
  return tuple(
    -math.inf if x is None else sign * x
    for sign, x in ((1, row['valid']), (-1, row['loss']))
  )


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
