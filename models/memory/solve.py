"""Unit lower-triangular systems `(I + L) Z = B`, differentiable to any order.

The inverse is built by blocks of 8: inside a block by the product form
`prod (I + (-L)^(2^i))` in float32, blocks joined by matmuls. The product form
over a whole chunk of 64 cancels catastrophically when keys are alike: the
powers hold binomial coefficients, C(63, 31) against C(7, 3) here.
"""

import jax
import jax.numpy as jnp

BLOCK = 8
FEW = 4


def dot(a, b, dtype):
  """Matrix product in `dtype`, accumulated and returned in float32."""
  precision = 'highest' if dtype == jnp.float32 else None
  return jnp.matmul(
    a.astype(dtype),
    b.astype(dtype),
    precision=precision,
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )


def _exact(a, b):
  if b.shape[-2] <= FEW:  # too small for anybody's matmul
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)
  return jnp.matmul(a, b, precision='highest')


def _product_form(L):
  """Inverse of `I + L` for strictly lower `L` of few rows."""
  n = L.shape[-1]
  eye = jnp.broadcast_to(jnp.eye(n, dtype=L.dtype), L.shape)
  inverse, power, exponent = eye - L, L, 1
  while 2 * exponent < n:
    power = _exact(power, power)
    inverse = _exact(inverse, eye + power)
    exponent *= 2
  return inverse


def _blocks(L, size: int):
  """The blocks of `size` on the diagonal, `[..., n, size, size]`."""
  starts = range(0, L.shape[-1], size)
  # slices, not a diagonal: XLA's simplifier dies of products of those on GPUs
  blocks = [L[..., i : i + size, i : i + size] for i in starts]
  return jnp.stack(blocks, axis=-3)


def unit_lower_inverse(L, block: int = BLOCK):
  """`(I + L)^-1` for `L [..., C, C]`, whose upper half and diagonal are 0.

  Args:
    block: rows of the blocks whose inverse is a product, a power of two: at
      most 8 for entries of at most 1; 2 takes any, as no power is formed.
  """
  C, size = L.shape[-1], block
  while size < C:
    size *= 2
  L = jnp.pad(L, [(0, 0)] * (L.ndim - 2) + [(0, size - C)] * 2)
  size = block
  inverse = _product_form(_blocks(L, size))  # of all blocks at once
  while size < L.shape[-1]:
    first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
    below = _blocks(L, 2 * size)[..., size:, :size]
    corner = -_exact(second, _exact(below, first))
    top = jnp.concatenate([first, jnp.zeros_like(corner)], axis=-1)
    inverse = jnp.concatenate(
      [top, jnp.concatenate([corner, second], axis=-1)], axis=-2
    )
    size *= 2
  return inverse[..., 0, :C, :C]


def solve_unit_lower(L, rhs, dtype=jnp.float32, block: int = BLOCK):
  """Solves `(I + L) Z = rhs`; derivatives in closed form, not via the inverse.

  Args:
    L: strictly lower triangular, `[C, C]`, float32.
    rhs: `[C, R]`, float32.
    dtype: of the operands where the inverse is applied; it is always built in
      float32.
    block: see `unit_lower_inverse`.

  Returns:
    Z `[C, R]`, float32.
  """
  inverse = unit_lower_inverse(jax.lax.stop_gradient(L), block)
  return jax.lax.custom_linear_solve(
    lambda z: z + dot(L, z, dtype),
    rhs,
    solve=lambda _, b: dot(inverse, b, dtype),
    transpose_solve=lambda _, b: dot(inverse.T, b, dtype),
  )
