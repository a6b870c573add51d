"""Polynomials a s + b s^3 + c s^5 for Newton-Schulz: one triple a step."""

import functools
from collections.abc import Sequence

import numpy as np

from nestax.optim import arguments

Coefficients = Sequence[tuple[float, float, float]]


class CoefficientError(ValueError):
  """A schedule of coefficients cannot be made from the numbers given."""


def quintic(steps: int = 5) -> Coefficients:
  """Gives Muon's coefficients: steep at zero, ends near 1, not at 1."""
  return ((3.4445, -4.7750, 2.0315),) * _checked(steps)


def cubic(steps: int = 12) -> Coefficients:
  """Gives X <- (3 X - X X^T X) / 2, slow at first and exact in the end."""
  return ((1.5, -0.5, 0.0),) * _checked(steps)


@functools.cache
def polar_express(
  steps: int = 8, lower: float = 1e-3, cushion: float = 0.02
) -> Coefficients:
  """Gives the best quintic of each step for the interval the last one left.

  The idea of Amsel et al. 2025 (arXiv 2505.16932), computed here by Remez'
  exchange: greedily, each polynomial has the least largest distance from 1
  on the singular values that are still possible.

  Args:
    steps: number of steps; 8 bring 1e-3 within a hundredth of 1.
    lower: smallest singular value, relative to the Frobenius norm, that has
      to be brought to 1; smaller ones grow, but less far.
    cushion: no step is fitted to an interval wider than 1 : cushion, as the
      polynomial would come near 0 inside it, within the rounding of bfloat16.

  Raises:
    CoefficientError: if `lower` or `cushion` is not between 0 and 1.
  """
  for name, value in (('lower', lower), ('cushion', cushion)):
    arguments.within(CoefficientError, name, value, 0, 1, low_open=True)
  triples = []
  low, high = lower, 1.0
  for step in range(_checked(steps)):
    triple, error = _minimax(max(low, cushion * high), high)
    reached = min(
      np.polyval([triple[2], 0, triple[1], 0, triple[0], 0], low), 1 - error
    )
    centre = 2 / (reached + 1 + error)  # both ends equally far from 1
    low, high = centre * reached, centre * (1 + error)
    # Rounding can push singular values over the end of the interval, where
    # the polynomials run away: leave them 1% of room, but for the last.
    room = 1.01 if step < steps - 1 else 1.0
    triples.append(
      tuple(
        float(centre * x / room ** (2 * i + 1)) for i, x in enumerate(triple)
      )
    )
  return tuple(triples)


def _minimax(low, high):
  """Fits a x + b x^3 + c x^5 to 1 on [low, high] by exchange of 4 points."""
  if low > 0.999 * high:  # the system is singular in the limit
    return np.array([15, -10, 3]) / 8 / high ** np.array([1, 3, 5]), 0.0
  points = np.linspace(low, high, 4)
  signs = np.array([1.0, -1.0, 1.0, -1.0])
  for _ in range(50):
    powers = points[:, None] ** np.array([1, 3, 5])
    *triple, error = np.linalg.solve(
      np.concatenate([powers, signs[:, None]], axis=1), np.ones(4)
    )
    a, b, c = triple
    root = np.sqrt(9 * b * b - 20 * a * c)
    points[1:3] = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
  return np.array(triple), error


def read(coefficients: Coefficients) -> Coefficients:
  """Makes a tuple of triples of Python's floats, and refuses what is none.

  Elements of arrays are traced under `jit`, and an iterator is at its end when
  it is read again.

  Raises:
    CoefficientError: with what was given, if that is not one or more triples
      of finite numbers.
  """
  try:
    if hasattr(coefficients, '__array__'):
      coefficients = np.asarray(coefficients)
    triples = tuple(tuple(float(x) for x in t) for t in coefficients)
  except (TypeError, ValueError):
    triples = ()
  sizes = {len(triple) for triple in triples}
  if sizes != {3} or not np.isfinite(triples).all():
    raise CoefficientError(
      f'the coefficients are {coefficients!r}: they have to be triples '
      '(a, b, c) of finite numbers, one for each step and at least one'
    )
  return triples


def _checked(steps):
  arguments.whole(CoefficientError, 'the number of steps', steps)
  return steps


MUON = quintic(5)
