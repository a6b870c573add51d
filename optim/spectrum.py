"""How close to 1 singular values come: a table over condition numbers."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nestax.optim import coefficients as coefficients_lib
from nestax.optim import newton_schulz


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
  """Draws a float32 matrix of standard normal numbers."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(rows, columns)).astype(np.float32)


def with_condition(
  rows: int, columns: int, condition: float, seed: int = 0
) -> np.ndarray:
  """Draws a float32 matrix with singular values evenly spread in the log."""
  rng = np.random.default_rng(seed)
  rank = min(rows, columns)
  u, _ = np.linalg.qr(rng.normal(size=(rows, rank)))
  v, _ = np.linalg.qr(rng.normal(size=(columns, rank)))
  values = np.logspace(0, -np.log10(condition), rank)
  return ((u * values) @ v.T).astype(np.float32)


def extremes(
  x: jax.typing.ArrayLike,
  coefficients: coefficients_lib.Coefficients,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> tuple[float, float]:
  """Orthogonalises a matrix and gives its least and largest singular value."""
  y = newton_schulz.orthogonalize(jnp.asarray(x), coefficients, dtype)
  values = np.linalg.svd(np.asarray(y, np.float64), compute_uv=False)
  return float(values.min()), float(values.max())


def table(
  schedules: Mapping[str, coefficients_lib.Coefficients] | None = None,
  conditions: Sequence[float] = (10, 1e2, 1e3, 1e4),
  shape: tuple[int, int] = (256, 64),
) -> str:
  """Writes least and largest singular value, schedules by what goes in.

  Args:
    schedules: a name for each schedule of coefficients; None for Muon's, the
      cubic and the Polar-Express type at several numbers of steps.
    conditions: condition numbers of the matrices that go in.
    shape: of these matrices.

  Returns:
    A table in Markdown, bfloat16 matmuls; its first column is a Gaussian
    matrix, the others are matrices of those condition numbers.
  """
  draws = {'Gaussian': gaussian(*shape)}
  draws |= {f'{c:g}': with_condition(*shape, c) for c in conditions}
  schedules = default_schedules() if schedules is None else schedules
  lines = [
    '| coefficients | ' + ' | '.join(draws) + ' |',
    '|---' * (len(draws) + 1) + '|',
  ]
  for name, coefficients in schedules.items():
    ends = (extremes(x, coefficients) for x in draws.values())
    words = (f'{low:.3f} to {high:.3f}' for low, high in ends)
    lines.append(f'| {name} | ' + ' | '.join(words) + ' |')
  return '\n'.join(lines)


def default_schedules() -> dict[str, coefficients_lib.Coefficients]:
  """Names the schedules that the table compares."""
  schedules = {}
  for steps in (3, 5, 8):
    schedules[f'quintic, {steps} steps'] = coefficients_lib.quintic(steps)
  for steps in (5, 6, 7, 8, 9):
    schedules[f'polar express, {steps} steps'] = coefficients_lib.polar_express(
      steps
    )
  for steps in (3, 12, 20):
    schedules[f'cubic, {steps} steps'] = coefficients_lib.cubic(steps)
  return schedules


if __name__ == '__main__':
  print(table())
