"""Updates of one root mean square, whatever the sizes of their matrices.

AdamW's updates have an RMS near 0.2 at every width, an orthogonal matrix
[in, out] has 1 / sqrt(max(in, out)) (arXiv 2502.16982).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from nestax.optim import matrices


def from_shape(
  updates: Any,
  rms: jax.typing.ArrayLike,
  dimension_numbers: matrices.DimensionNumbers,
) -> Any:
  """Scales orthogonal matrices, whose RMS their shapes tell."""

  def one(x, number):
    longest = max(matrices.sizes(x.shape, number))
    return x * (rms * math.sqrt(longest))

  numbers = matrices.resolve(updates, dimension_numbers)
  return jax.tree.map(one, updates, numbers)


def measured(
  updates: Any,
  rms: jax.typing.ArrayLike,
  dimension_numbers: matrices.DimensionNumbers,
  eps: jax.typing.ArrayLike,
) -> Any:
  """Scales each matrix by its own RMS; `eps` keeps zeros zero."""

  def one(x, number):
    axes = matrices.matrix_axes(x.ndim, number)
    size = jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))
    return x * (rms / (size + eps))

  numbers = matrices.resolve(updates, dimension_numbers)
  return jax.tree.map(one, updates, numbers)
