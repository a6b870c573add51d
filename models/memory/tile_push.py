"""How steps reach memories by way of their momentum, inside a chunk of tiles.

With `B[s, i]` the momentum gate's product over (i, s] and G that of the forget
gate, what token i adds to the momentum is in the memory after t with the
weight `A[t, i] = (G B)[t, i] = alpha_t A_p[t, i] + B[t, i]`, and in the one
before with `A_p = G_p B`; the boundary's momentum, whose weight is b, with
`c = G b` and `c_p = G_p b`. A token of padding lets the momentum pass by
without adding it: it stands neither in G_p nor, as t, in A and c.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.tile_ops import (
  as_columns,
  columns_as_rows,
  iota,
  nn,
  nt,
  tn,
)

NEVER = -1e30  # the logarithm of zero, without its infinities


class Push(NamedTuple):
  """Weights of momenta in the memories of a chunk, float32."""

  B_CxC: jax.Array
  G_p_CxC: jax.Array  # of tokens that count
  A_p_CxC: jax.Array
  A_CxC: jax.Array
  c_p_Cx1: jax.Array
  c_p_1xC: jax.Array
  c_Cx1: jax.Array
  last_A_Cx1: jax.Array  # of steps in the memory at the chunk's end
  last_A_1xC: jax.Array


def decay(rows, columns, at: str, after: str, strict: bool):
  """`exp(column - row)` where a token reaches another, `[C, C]`.

  Args:
    rows, columns: of the chunk's tokens, sums of logarithms of gates.
    at: the sum up to the token that is reached, or to the one before.
    after: the sum up to the token that reaches it.
    strict: no token reaches itself.
  """
  C = rows[after].shape[1]
  t, i = iota((C, C), 0), iota((C, C), 1)
  mask = t > i if strict else t >= i
  if 'document' in rows:
    mask = mask & (columns['document'] == rows['document'])
  # masked before the exponential: above the diagonal it would overflow
  return jnp.exp(jnp.where(mask, columns[at] - rows[after], NEVER))


def push_rows(total_1xC, log_alpha_1xC, before_1xC, alive, live_1xC, same):
  """Rows of momentum's gate, whose logarithms' sums are `total`.

  Args:
    alive: 1 for tokens of the document that the chunk began in, or None.
    live_1xC: 1 for tokens that count, or None.
    same: 1 for tokens of the document that the chunk ends in, or None.
  """
  rows = {
    'total_b': total_1xC,
    'b': jnp.exp(total_1xC),
    'last_b': jnp.exp(total_1xC[:, -1:] - total_1xC),
    'alpha': jnp.exp(log_alpha_1xC),
    'before': before_1xC,
  }
  if alive is not None:
    rows['b'] = rows['b'] * alive
    rows['last_b'] = rows['last_b'] * same
    rows['live'] = live_1xC
  return rows


def push_steps(rows, columns, G_p_CxC, dtype):
  """The weights of momenta; a generator of steps."""
  B = decay(rows, columns, 'total_b', 'total_b', strict=False)
  yield
  live_b, own = columns['b'], B
  if 'live' in rows:
    G_p_CxC = G_p_CxC * rows['live']
    live_b, own = columns['live'] * live_b, columns['live'] * B
  A_p = nn(G_p_CxC, B, dtype)
  c_p = jnp.sum(G_p_CxC * rows['b'], axis=1, keepdims=True)
  yield
  alpha = columns['alpha']
  A, c = alpha * A_p + own, alpha * c_p + live_b
  last_A = A[-1:]
  turned = as_columns({'last_A': last_A})['last_A']
  c_p_1xC = columns_as_rows({'c_p': c_p})['c_p']
  return Push(B, G_p_CxC, A_p, A, c_p, c_p_1xC, c, turned, last_A)


def push_back(f, sums, d_A, d_A_p, d_c, d_c_p, dtype):
  """From the weights: gathers gradients of the gates' logarithms.

  Args:
    f: Front of the chunk.
    sums: `tile_gates.Sums`, which gets them.
    d_A, d_A_p: of weights of steps, `[C, C]`; those of the last memory are
      in the last row of `d_A`.
    d_c, d_c_p: of weights of the boundary's momentum, `[C, 1]`.
  """
  p, rows, columns = f.push, f.rows, f.columns
  alpha, b = columns['alpha'], columns['b']
  sums.column('alpha', alpha * (d_A * p.A_p_CxC))
  sums.column('alpha', alpha * (d_c * p.c_p_Cx1))
  d_A_p, d_c_p = d_A_p + alpha * d_A, d_c_p + alpha * d_c
  d_B, d_b = d_A, d_c
  if 'live' in rows:
    d_B, d_b = columns['live'] * d_B, columns['live'] * d_b
  d_G_p = nt(d_A_p, p.B_CxC, dtype) + d_c_p * rows['b']
  d_B = d_B + tn(p.G_p_CxC, d_A_p, dtype)
  yield
  sums.row('total_b', p.G_p_CxC * d_c_p * rows['b'])
  sums.column('total_b', d_b * b)
  for d, x, at, after in (
    (d_G_p, p.G_p_CxC, 'before', 'minus'),
    (d_B, p.B_CxC, 'total_b', 'minus_b'),
  ):
    sums.column(at, d * x)
    sums.row(after, d * x)
