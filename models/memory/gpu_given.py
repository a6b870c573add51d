"""The end of the way back on a GPU where nothing is read but `mem`.

Keys and values are the ones handed in and so are the gates: what has reached
them by way of `mem` is all. Nothing is walked, and there is nothing slow but
`mem` to collect gradients of.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_adjoint, gpu_tile
from nestax.models.memory.gpu_layout import (
  Shape,
  array,
  call,
  put_rows,
  put_tokens,
  scalars_of,
)

WARPS = 4


def covers(shape: Shape) -> bool:
  return shape.free and not shape.own_gates


def finish(shape: Shape, stream, walked, parts):
  """Gradients of (key, value) and of scalars, `[B, H, n, 2 or 3, C]`.

  Those are both gates' logarithms, and with momentum the sum of its gate's.

  Args:
    shape: of the walk.
    stream: inputs.
    walked: of the walk.
    parts: of the tokens by `mem`, of `gpu_parts` or `gpu_momentum_parts`.
  """
  B, _, H, _ = stream.query.shape
  d_tokens = tuple(
    jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (stream.key, stream.value)
  )
  count = 2 + shape.cfg.momentum
  d_scalars = array(shape, B, H)(count, shape.C, dtype='float32')
  tokens = walked.k, walked.v, walked.scalars
  return call(
    _finish_kernel, shape, (shape.n, H, B), (tokens, parts),
    (d_tokens, d_scalars), 'memory_finish', WARPS, 1,
  )  # fmt: skip


def _finish_kernel(shape: Shape, tokens, parts, d_tokens, d_scalars):
  b, h, i = at = tuple(pl.program_id(axis) for axis in (2, 1, 0))
  k, v, scalars = tokens
  gate, *norms = scalars_of(shape, scalars, at)
  sums = _of_pieces if shape.cfg.momentum else _of_parts
  *d_kv, (total, enters, eta, *total_b) = sums(parts, at)
  reached = gpu_adjoint.Tokens(None, None, total, enters, eta)
  put_rows(d_scalars, at, (*gpu_adjoint.logits_back(gate, reached), *total_b))
  for ref, d, y, norm in zip(d_tokens, d_kv, (k, v), norms):
    d = gpu_tile.unit_back(d, y[at].astype(jnp.float32), norm)
    put_tokens(shape, ref, at, d)


def _of_parts(parts, at):
  """What reaches keys, values and scalars."""
  rows = [parts.scalars[(*at, j, slice(None))] for j in range(3)]
  return *(x[at].astype(jnp.float32) for x in parts[:2]), rows


def _of_pieces(pieces, at):
  *_, count, number, _ = pieces.rows.shape

  def total(ref, *more):
    found = (ref[(*at, j, *more)] for j in range(count))
    return sum(x.astype(jnp.float32) for x in found)

  rows = [total(pieces.rows, row, slice(None)) for row in range(number)]
  return total(pieces.k), pieces.v[at].astype(jnp.float32), rows
