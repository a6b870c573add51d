"""`(I + L)^-1` of strictly lower triangular tiles, by full-width matmuls.

The blocks of 8 on the diagonal are inverted by substitution, all at once on
the vector unit in the width of the matrix; then pairs of blocks are joined,
`[[A, 0], [-B L A, B]]`, all pairs of a size at once. No small matrices, no
slices off the registers' grid; and no product form, whose powers cancel when
keys are alike.
"""

import jax
import jax.numpy as jnp

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


def _spread(columns, C: int):
  """Each lane's value over the eight lanes of its group.

  `columns` are zero but at one lane a group; a matmul with ones moves them,
  exactly, in three bfloat16 parts.
  """
  ones = ((_iota((C, C), 0) >> 3) == (_iota((C, C), 1) >> 3)).astype(
    jnp.float32
  )
  if columns.dtype != jnp.float32:
    return _matmul(columns, ones.astype(columns.dtype), columns.dtype)
  n, parts, rest = columns.shape[0], [], columns
  for _ in range(3):
    part = rest.astype(jnp.bfloat16).astype(jnp.float32)
    parts.append(part)
    rest = rest - part
  out = _matmul(jnp.concatenate(parts), ones, jnp.bfloat16)
  return out[:n] + out[n : 2 * n] + out[2 * n :]


def _diagonal_inverse(L):
  """Inverses of the blocks of 8 on the diagonal, `[8, C]` side by side."""
  C = L.shape[0]
  own = (_iota((C, C), 0) >> 3) == (_iota((C, C), 1) >> 3)
  blocks = jnp.where(own, L, 0.0).reshape(C // BLOCK, BLOCK, C).sum(axis=0)
  lane = _iota((BLOCK, C), 1) & 7
  columns = [jnp.where(lane == j, blocks, 0.0) for j in range(BLOCK - 1)]
  columns = _spread(jnp.concatenate(columns), C)
  T = (_iota((BLOCK, C), 0) == lane).astype(L.dtype)
  for j in range(BLOCK - 1):
    T = T - columns[BLOCK * j : BLOCK * (j + 1)] * T[j : j + 1]
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
  C = L.shape[0]
  row, column = _iota((C, C), 0), _iota((C, C), 1)
  T = _diagonal_inverse(L)
  T = jnp.broadcast_to(T[None], (C // BLOCK, BLOCK, C)).reshape(C, C)
  T = jnp.where((row >> 3) == (column >> 3), T, 0.0)
  bits = 3
  while (1 << bits) < C:
    pair = (row >> (bits + 1)) == (column >> (bits + 1))
    corner = pair & ((row >> bits) > (column >> bits))
    T = T - _matmul(T, _matmul(jnp.where(corner, L, 0.0), T, dtype), dtype)
    bits += 1
  return T
