"""`(I + L)^-1` of strictly lower triangular tiles, by full-width matmuls.

The blocks of 8 on the diagonal are inverted by substitution, all at once on
the vector unit in the width of the matrix; then pairs of blocks are joined,
`[[A, 0], [-B L A, B]]`, all pairs of a size at once: only the rows of the
lower blocks change, and only they are multiplied. No slices off the registers'
grid; and no product form, whose powers cancel when keys are alike.
"""

import jax
import jax.numpy as jnp

from nestax.models.memory.steps import last
from nestax.models.memory.tile_ops import parts

BLOCK = 8


def _iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _matmul(a, b, dtype):
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (((1,), (0,)), ((), ())),
    precision='highest' if dtype == jnp.float32 else None,
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )


def _spread(columns, C: int, dtype):
  """Each lane's value over the eight lanes of its group.

  `columns` are zero but at one lane a group; a matmul with ones moves them in
  bfloat16 parts: three are exact, two more than enough for bfloat16 operands.
  """
  ones = ((_iota((C, C), 0) >> 3) == (_iota((C, C), 1) >> 3)).astype(
    jnp.float32
  )
  if columns.dtype != jnp.float32:
    return _matmul(columns, ones.astype(columns.dtype), columns.dtype)
  found = parts(columns, 2 if dtype == jnp.bfloat16 else 3)
  out = _matmul(jnp.concatenate(found), ones, jnp.bfloat16)
  return sum(jnp.split(out, len(found)))


def _diagonal_inverse(L, dtype):
  """Inverses of the blocks of 8 on the diagonal, `[8, C]` side by side."""
  C = L.shape[0]
  own = (_iota((C, C), 0) >> 3) == (_iota((C, C), 1) >> 3)
  blocks = jnp.where(own, L, 0.0).reshape(C // BLOCK, BLOCK, C).sum(axis=0)
  lane = _iota((BLOCK, C), 1) & 7
  columns = [jnp.where(lane == j, blocks, 0.0) for j in range(BLOCK - 1)]
  columns = _spread(jnp.concatenate(columns), C, dtype)
  T = (_iota((BLOCK, C), 0) == lane).astype(L.dtype)
  for j in range(BLOCK - 1):
    T = T - columns[BLOCK * j : BLOCK * (j + 1)] * T[j : j + 1]
  return T


def _join(T, L, size: int, dtype):
  """Joins pairs of inverted blocks of `size` rows; a generator of steps."""
  C = L.shape[0]
  starts = range(size, C, 2 * size)

  def lower(x):
    return jnp.concatenate([x[i : i + size] for i in starts])

  bits = size.bit_length() - 1
  # rows and columns of one pair differ in this bit and none above it
  apart = lower(_iota((C, C), 0) ^ _iota((C, C), 1)) >> bits
  corner = _matmul(jnp.where(apart == 1, lower(L), 0.0), T, dtype)
  yield
  zero = jnp.zeros((size, C), corner.dtype)
  places = range(0, len(starts) * size, size)
  corner = [y for i in places for y in (zero, corner[i : i + size])]
  below = lower(T) - _matmul(lower(T), jnp.concatenate(corner), dtype)
  parts = [
    y
    for i, at in zip(places, starts)
    for y in (T[at - size : at], below[i : i + size])
  ]
  return jnp.concatenate(parts)


def inverse_steps(L, dtype):
  """`dense_inverse` as a generator, see `steps`."""
  C = L.shape[0]
  row, column = _iota((C, C), 0), _iota((C, C), 1)
  T = _diagonal_inverse(L, dtype)
  T = jnp.broadcast_to(T[None], (C // BLOCK, BLOCK, C)).reshape(C, C)
  T = jnp.where((row >> 3) == (column >> 3), T, 0.0)
  size = BLOCK
  while size < C:
    yield
    T = yield from _join(T, L, size, dtype)
    size *= 2
  return T


def dense_inverse(L, dtype):
  """Inverts `I + L`.

  Args:
    L: `[C, C]`, strictly lower triangular; C a power of two, at least 8.
    dtype: of the operands where blocks are joined; inside the blocks of 8
      the arithmetic is L's.

  Returns:
    `[C, C]` of L's dtype.
  """
  return last(inverse_steps(L, dtype))
