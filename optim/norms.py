"""Norms of gradients that do not overflow."""

import jax
import jax.numpy as jnp

_SHRINK = 2.0**-96


def frobenius(x: jax.Array) -> jax.Array:
  """Gives the Frobenius norm of each matrix `[..., m, n]`, `[..., 1, 1]`.

  Args:
    x: float32.

  Returns:
    float32: 0 for matrices without elements, and the largest number there is
    for norms beyond it.
  """
  _, norm, huge = _measure(x)
  norm = jnp.where(huge, norm / _SHRINK, norm)
  return jnp.minimum(norm, jnp.finfo(jnp.float32).max)


def unit(x: jax.Array, eps: jax.typing.ArrayLike) -> jax.Array:
  """Divides each matrix by its Frobenius norm plus `eps`; finite if x is."""
  x, norm, _ = _measure(x)
  return x / (norm + eps)


def _measure(x):
  """Gives x, 2^-96 x where its squares overflow, with its norm, and which.

  Squares of elements beyond 1e19 are too large for float32. Both sums read
  `x` once, where a scale by the largest element would have to be known first.
  """
  axes = (-2, -1)
  small = x * _SHRINK
  total = jnp.sum(x * x, axis=axes, keepdims=True)
  shrunk = jnp.sum(small * small, axis=axes, keepdims=True)
  huge = ~jnp.isfinite(total)
  norm = jnp.sqrt(jnp.where(huge, shrunk, total))
  return jnp.where(huge, small, x), norm, huge
