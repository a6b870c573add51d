"""The backward pass with momentum on a GPU by way of `mem`: chunk by chunk.

What reaches the tokens from the fast part and momentum of `mem` after each
chunk, which `gpu_momentum_link` has taken back before, and what
`gpu_momentum_read` has found of the output.
"""

import functools

import jax.numpy as jnp

from nestax.models.memory import (
  gpu_adjoint,
  gpu_momentum,
  gpu_momentum_adjoint,
  gpu_steps,
)
from nestax.models.memory.gpu_layout import Shape, array, call, put
from nestax.models.memory.gpu_momentum_adjoint import (
  ROWS,
  Piece,
  System,
  Written,
)

WARPS = 4


def pieces_of(shape: Shape, B: int, H: int) -> Piece:
  """Shapes of what reaches each chunk's tokens, `[B, H, n, pieces, ...]`."""
  make, C, K = array(shape, B, H), shape.C, shape.K
  count = gpu_momentum_adjoint.pieces(shape)
  rows = make(count, len(ROWS), C, dtype='float32')
  return Piece(make(count, C, K), make(C, K), rows)


def parts(shape: Shape, slow, stream, saved, read, d_both):
  """(Piece, gradient of what is written into `mem`).

  Args:
    shape: of the walk.
    slow: slow values.
    stream: inputs.
    saved: (Walked, fast part and momentum of `mem`, its Steps).
    read: what came by the output, see `gpu_momentum_read`.
    d_both: of fast part and momentum of `mem` after each chunk.
  """
  B, H = stream.query.shape[0], stream.query.shape[2]
  walked, both, steps = saved
  saved = walked._replace(start=None), both, steps
  count = gpu_momentum_adjoint.pieces(shape)
  return call(
    _parts_kernel, shape, (H, B, count * shape.n),
    (slow.maps['mem'], stream, saved, read, d_both),
    (pieces_of(shape, B, H), array(shape, B, H)(shape.C, shape.K)),
    'memory_momentum_parts', WARPS, 1,
  )  # fmt: skip


def _parts_kernel(shape: Shape, W, stream, saved, read, d_both, parts,
                  d_U_ref):  # fmt: skip
  refs = W, stream, saved, read, d_both, parts, d_U_ref
  finds = (_by_written, _by_P, _by_system)[: gpu_momentum_adjoint.pieces(shape)]
  gpu_steps.each_chunk(*(functools.partial(f, shape, refs) for f in finds))


def _of_steps(dots, found, *by_end):
  """What reaches the steps `[C, K]` by the output and by the chunk's end."""
  total = 0.0 if found is None else found.astype(jnp.float32)
  for keys, d in by_end:
    total = total + dots.nt(keys, d)
  return total.astype(dots.dtype)


def _by_written(shape: Shape, refs, at):
  W, stream, (walked, both, steps), read, d_both, parts, d_U_ref = refs
  dots, (b, h, i) = shape.dots, at
  chunk = gpu_momentum.here(shape, stream, walked, at)
  D, S = (ref[at] for ref in both)
  E, F = (ref[at] for ref in d_both)
  U = steps.U[at]
  kb = gpu_momentum.sides_of(shape, chunk).kb
  found = None if read.steps is None else read.steps.U[at]
  d_U = _of_steps(dots, found, (walked.ku[at], E), (kb, F))
  put(d_U_ref, at, d_U)
  wide_D, wide_S, wide_E, wide_F = (x.astype(jnp.float32) for x in (D, S, E, F))

  def of_lw():
    d_lw = gpu_adjoint.alive_only(chunk.decay, dots.nn(d_U, D))
    return d_lw + dots.nn(d_U, W[h, :, :])

  piece = gpu_momentum_adjoint.through_written(
    shape,
    chunk,
    Written(
      lambda: dots.nn(U, E),
      lambda: dots.nn(U, F),
      of_lw,
      lambda: d_U.astype(jnp.float32),
      jnp.sum(wide_E * wide_D),
      jnp.sum(wide_E * wide_S),
      jnp.sum(wide_F * wide_S),
    ),
  )
  if read.steps is not None:
    total, enters, eta, total_b = piece.rows
    total = total + read.scalars[b, h, i, 0, :] + read.gates[b, h, i, 0, :]
    total_b = total_b + read.gates[b, h, i, 1, :]
    d_k = piece.k + read.k[at].astype(jnp.float32)
    piece = Piece(d_k, piece.v, (total, enters, eta, total_b))
  gpu_momentum_adjoint.put_piece(parts, 0, at, piece)


def _of_R(shape: Shape, walked, read, E, at):
  """What reaches the system's right-hand sides."""
  found = None if read.steps is None else read.steps.Z[at]
  return _of_steps(shape.dots, found, (walked.turned_k[at], E))


def _by_P(shape: Shape, refs, at):
  _, stream, (walked, _, steps), read, d_both, parts, _ = refs
  d_R = _of_R(shape, walked, read, d_both[0][at], at)
  d_P = -shape.dots.nt(d_R, steps.U[at])
  chunk = gpu_momentum.here(shape, stream, walked, at)
  piece = gpu_momentum_adjoint.through_P(shape, chunk, walked.A_p[at], d_P)
  gpu_momentum_adjoint.put_piece(parts, 1, at, piece)


def _by_system(shape: Shape, refs, at):
  _, stream, (walked, both, steps), read, d_both, parts, _ = refs
  dots, chunk = shape.dots, gpu_momentum.here(shape, stream, walked, at)
  E, Z = d_both[0][at], steps.Z[at]
  d_R = _of_R(shape, walked, read, E, at)
  piece = gpu_momentum_adjoint.through_system(
    shape,
    chunk,
    System(
      lambda: dots.nn(d_R, both[0][at]),
      lambda: dots.nn(d_R, both[1][at]),
      lambda: dots.nn(Z, E),
      lambda _: dots.nt(d_R, Z),
    ),
  )
  gpu_momentum_adjoint.put_piece(parts, 2, at, piece)
