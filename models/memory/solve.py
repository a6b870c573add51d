"""Unit lower-triangular systems `(I + L) Z = B`, differentiable to any order.

The inverse is built by blocks of 8: inside a block by the product form
`prod (I + (-L)^(2^i))` in float32, blocks joined by matmuls. The product form
over a whole chunk of 64 cancels catastrophically when keys are alike: the
powers hold binomial coefficients, C(63, 31) against C(7, 3) here.
"""

import jax
import jax.numpy as jnp

BLOCK = 8


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
  return jnp.matmul(a, b, precision='highest')


def _product_form(L, n: int):
  """Inverse of `I + L` for strictly lower `L` of at most BLOCK rows."""
  eye = jnp.eye(n, dtype=L.dtype)
  eye = eye.reshape((1,) * (L.ndim - 2) + eye.shape)
  inverse, power, exponent = eye - L, L, 1
  while 2 * exponent < n:
    power = _exact(power, power)
    inverse = _exact(inverse, eye + power)
    exponent *= 2
  return inverse


def unit_lower_inverse(L):
  """`(I + L)^-1` for `L [..., C, C]`, whose upper half and diagonal are 0."""
  n = L.shape[-1]
  if n <= BLOCK:
    return _product_form(L, n)
  half = BLOCK
  while 2 * half < n:
    half *= 2
  first = unit_lower_inverse(L[..., :half, :half])
  second = unit_lower_inverse(L[..., half:, half:])
  corner = -_exact(second, _exact(L[..., half:, :half], first))
  top = jnp.concatenate([first, jnp.zeros_like(corner).mT], axis=-1)
  bottom = jnp.concatenate([corner, second], axis=-1)
  return jnp.concatenate([top, bottom], axis=-2)


def solve_unit_lower(L, rhs, dtype=jnp.float32):
  """Solves `(I + L) Z = rhs`; derivatives in closed form, not via the inverse.

  Args:
    L: strictly lower triangular, `[C, C]`, float32.
    rhs: `[C, R]`, float32.
    dtype: of the operands where the inverse is applied; it is always built in
      float32.

  Returns:
    Z `[C, R]`, float32.
  """
  inverse = unit_lower_inverse(jax.lax.stop_gradient(L))
  return jax.lax.custom_linear_solve(
    lambda z: z + dot(L, z, dtype),
    rhs,
    solve=lambda _, b: dot(inverse, b, dtype),
    transpose_solve=lambda _, b: dot(inverse.T, b, dtype),
  )
