"""The walk back with momentum on a GPU: what keys, values and gates read.

It takes the gradients E and F of the fast parts and momenta that
`gpu_momentum_walk` carries over the chunks, two kernels each, see `gpu_steps`.
Those enter a chunk by the same matrices for all memories, so the tokens see
them only in sums over the memories, `[K, K]`, such as `N = sum D^T E`. One
kernel, in a program a memory, sends what its tokens' keys, values or logits
got into the memory that they were read from, and finds its part of the sums;
the other finds what reaches the tokens, in a program a piece.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import (
  gpu_adjoint,
  gpu_momentum,
  gpu_momentum_adjoint,
  gpu_momentum_over,
  gpu_steps,
)
from nestax.models.memory.gpu_layout import Fast, Shape, array, call
from nestax.models.memory.gpu_momentum_adjoint import (
  ROWS,
  Piece,
  System,
  Written,
)
from nestax.models.memory.gpu_momentum_over import Carried, Sums, Turned
from nestax.models.memory.gpu_momentum_walk import Both
from nestax.models.memory.gpu_tile import COLUMNS

WARPS = 4


def turn(shape: Shape, slow, stream, walked, linked, parts: Piece,
         d_end: Both, d_boundary):  # fmt: skip
  """(Turned, gradients of the first chunk's fast parts and momenta).

  Args:
    shape: of the walk.
    slow: slow values.
    stream: inputs.
    walked: of the walk.
    linked: of the chunks.
    parts: of the tokens by `mem`.
    d_end: of fast parts and momenta at the end, `mem` None.
    d_boundary: of the fast parts after `stream.filled` chunks, or None.
  """
  B, H = stream.query.shape[0], stream.query.shape[2]
  make, C, K = array(shape, B, H), shape.C, shape.K
  E = Fast(
    {box: make(K, K) for box in shape.carried},
    make(K, COLUMNS) if shape.cfg.gates else None,
    None,
  )
  rows = make(2, C, dtype='float32'), make(1, C, dtype='float32')
  turned = Turned(E, E, make(C, K), make(C, K), *rows)
  args = slow, stream, walked._replace(T=None), linked, parts
  if shape.free:
    (turned,) = call(
      _free_kernel, shape, (B, H, shape.n), args, (turned,),
      'memory_momentum_turn', WARPS, 1,
    )  # fmt: skip
    return turned, d_end

  def reached(stop, d: Both):
    """The boundary is the fast parts as they were after `filled` chunks."""
    if d_boundary is None:
      return d
    due = (stream.filled == stop)[:, :, None, None]

    def add(x, change):
      return x + jnp.where(due, change, 0.0)

    return Both(jax.tree.map(add, d.D, d_boundary), d.S)

  def before(step, state: Carried):
    return state._replace(d=reached(shape.n - step, state.d))

  count = gpu_momentum_adjoint.pieces(shape)
  kernels = (
    gpu_steps.Kernel(
      gpu_momentum_over.over_kernel, 'memory_momentum_over', WARPS, 3
    ),
    gpu_steps.Kernel(_turn_kernel, 'memory_momentum_turn', WARPS, count),
  )
  steps = gpu_steps.Walk(shape, (B, H), args, turned)
  turned, state = steps.run(
    kernels,
    _nothing(shape, B, H, d_end, stream.document is not None),
    before,
    last=gpu_steps.Kernel(
      gpu_momentum_over.last_kernel, 'memory_momentum_last', WARPS, 3
    ),
  )
  return turned, reached(0, state.d)


def _nothing(shape: Shape, B: int, H: int, d: Both, docs: bool) -> Carried:
  """No token after the last chunk sends anything."""
  C, K, count = shape.C, shape.K, gpu_momentum_adjoint.pieces(shape)
  tile = jnp.zeros((B, H, K, K), shape.dtype)
  scalar = jnp.zeros((B, H), jnp.float32)
  sums = Sums(*[tile] * 4, tile if docs else None, *[scalar] * 3)
  boxes = [*shape.carried, *(['gates'] if shape.cfg.gates else [])]
  pieces = Piece(
    jnp.zeros((B, H, count, C, K), shape.dtype),
    jnp.zeros((B, H, C, K), shape.dtype),
    jnp.zeros((B, H, count, len(ROWS), C), jnp.float32),
  )
  return Carried(d, {box: sums for box in boxes}, pieces)


def _free_kernel(shape: Shape, slow, stream, walked, linked, parts, turned):
  at = tuple(pl.program_id(axis) for axis in range(3))
  found = shape, walked, parts, at, turned, at
  gpu_momentum_over.finish_key(*found)
  gpu_momentum_over.finish_value(*found)
  gpu_momentum_over.finish_logits(*found)


def _turn_kernel(shape: Shape, step, slow, stream, walked, linked, parts,
                 state, turned, new):  # fmt: skip
  """What reaches a chunk's tokens, a program a piece."""
  b, h = pl.program_id(0), pl.program_id(1)
  at = b, h, shape.n - 1 - step[0]

  def piece(j, find):
    def run():
      chunk = gpu_momentum.here(shape, stream, walked, at)
      found = find(shape, walked, linked, chunk, at, state.sums)
      found = gpu_momentum_adjoint.add_piece(found, parts, j, at)
      gpu_momentum_adjoint.put_piece(new.pieces, j, (b, h), found)

    return run

  finds = _written, _through_P, _system
  finds = finds[: gpu_momentum_adjoint.pieces(shape)]
  gpu_steps.each_program(*(piece(*x) for x in enumerate(finds)))


def _sum(shape: Shape, sums: dict[str, Sums], name: str, at):
  """Over the memories, in the matmuls' dtype; None where there is none."""
  refs = [getattr(x, name) for x in sums.values()]
  if refs[0] is None:
    return None
  if name in ('kept', 'c', 'b'):
    return sum(ref[at[:2]] for ref in refs)
  total = refs[0][at[:2]]
  for ref in refs[1:]:
    total = total + ref[at[:2]]
  return total


def _written(shape: Shape, walked, linked, chunk, at, sums) -> Piece:
  """Of what the chunk writes into the memories carried here."""
  dots, decay = shape.dots, chunk.decay
  side, ku = gpu_momentum.sides_of(shape, chunk), walked.ku[at]
  E, F, kept, c, b = (
    _sum(shape, sums, name, at) for name in ('E', 'F', 'kept', 'c', 'b')
  )

  def of_lw():
    d_lw = dots.nt(ku, E) + dots.nt(side.kb, F)
    if decay.alive is None:
      return d_lw
    N, Q = (_sum(shape, sums, name, at) for name in ('N', 'Q'))
    return d_lw + gpu_adjoint.alive_only(
      decay, dots.nt(ku, N) + dots.nt(side.kb, Q)
    )

  return gpu_momentum_adjoint.through_written(
    shape,
    chunk,
    Written(
      lambda: _along_lw(shape, side, chunk, E, sums, 'N', at),
      lambda: _along_lw(shape, side, chunk, F, sums, 'Q', at),
      of_lw,
      None,
      kept,
      c,
      b,
    ),
  )


def _along_lw(shape: Shape, side, chunk, of_slow, sums, name, at):
  """What reaches the keys that are written along lw."""
  total = shape.dots.nn(side.lw, of_slow)
  if chunk.decay.alive is None:
    return total
  return total + shape.dots.nn(side.alive_lw, _sum(shape, sums, name, at))


def _through_P(shape: Shape, walked, linked, chunk, at, sums) -> Piece:
  """Of what they take of each other before the system."""
  side = gpu_momentum.sides_of(shape, chunk)
  E = _sum(shape, sums, 'E', at)
  d_last_Ak = _along_lw(shape, side, chunk, E, sums, 'N', at)
  d_P = -shape.dots.nt(walked.turned_k[at], d_last_Ak)
  return gpu_momentum_adjoint.through_P(shape, chunk, walked.A_p[at], d_P)


def _system(shape: Shape, walked, linked, chunk, at, sums) -> Piece:
  """Of the system by which it does."""
  dots, turned_k = shape.dots, walked.turned_k[at]
  N, N_S, E = (_sum(shape, sums, name, at) for name in ('N', 'N_S', 'E'))
  X_D, X_S, X_W = (x[at] for x in linked.X)
  return gpu_momentum_adjoint.through_system(
    shape,
    chunk,
    System(
      lambda: dots.nt(turned_k, N),
      lambda: dots.nt(turned_k, N_S),
      lambda: dots.nn(X_D, N) + dots.nn(X_S, N_S) + dots.nn(X_W, E),
      lambda last_k: dots.nt(turned_k, last_k),
    ),
  )
