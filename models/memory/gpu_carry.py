"""The fast part of `mem` from chunk to chunk on a GPU, and its gradient back.

Nothing that a chunk computes depends on `mem` but what is read from it. So
once keys, values and gates are known its recurrence is linear,

  D_C = g_C D + D A + G,   A = ld^T Kt,   G = (W lw^T + target)^T Kt,

with `Kt = T^T last_k`; `link` finds A and G of all chunks at once, `carry`
walks, one matmul a chunk. The gradients go back by `A^T`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_gates, gpu_tile
from nestax.models.memory.gpu_layout import (
  Shape,
  array,
  call,
  marks_of,
  put,
  scalars_of,
)

WARPS = 4
STAGES = 3


class Linked(NamedTuple):
  """What takes fast parts over a chunk, `[B, H, n, ...]`."""

  turned_k: jax.Array  # Kt, [C, K]
  A: jax.Array  # [K, K]
  G: jax.Array  # of `mem`, [K, K]
  kept: jax.Array  # [], float32
  coupling: jax.Array | None  # `gpu_gates.coupling`, [C, C]; None: none


def link(shape: Shape, save: bool, slow, stream, walked) -> Linked:
  """Of all chunks; G only where `slow` holds values of `mem`."""
  W = slow.maps.get('mem')
  B, H = stream.query.shape[0], stream.query.shape[2]
  make, C, K = array(shape, B, H), shape.C, shape.K
  walked = walked._replace(D=None, D_gates=None, Z=None, Z_gates=None)
  outs = Linked(
    make(C, K),
    make(K, K),
    None if W is None else make(K, K),
    make(dtype='float32'),
    make(C, C) if save and shape.cfg.delta else None,
  )
  (linked,) = call(
    _link_kernel, shape, (shape.n, H, B),
    (W, stream, walked), (outs,), 'memory_link', WARPS, 1,
  )  # fmt: skip
  return linked


def _link_kernel(shape: Shape, W, stream, walked, linked):
  cfg, dots = shape.cfg, shape.dots
  i, h, b = (pl.program_id(axis) for axis in range(3))
  at = b, h, i
  marks = marks_of(stream, at)
  gate, *_ = scalars_of(shape, walked.scalars, at)
  decay = gpu_gates.decays(gate, marks)
  k, v = (x[b, h, i].astype(jnp.float32) for x in (walked.k, walked.v))
  side = gpu_tile.sides(cfg, dots, k, v, decay)
  turned_k = side.last_k
  if cfg.delta:
    if linked.coupling is not None:
      put(linked.coupling, at, gpu_gates.coupling(shape.dots, gate, marks))
    turned_k = dots.tn(walked.T[b, h, i], turned_k).astype(shape.dtype)
  put(linked.turned_k, at, turned_k)
  put(linked.A, at, dots.tn(side.ld, turned_k))
  linked.kept[b, h, i] = decay.kept
  if W is None:
    return
  write = gpu_tile.target(cfg, 'mem', k, v, decay.eta)
  if gpu_tile.has_point(cfg):
    write = write + dots.nt(side.lw, W[h, :, :])
  put(linked.G, at, dots.tn(write, turned_k))


def carry(shape: Shape, back: bool, linked: Linked, G, start, filled, change):
  """Walks the chunks, from the last to the first if `back`.

  Args:
    shape: of the walk.
    back: of gradients, whose G is the one given.
    linked: of the chunks.
    G: what each chunk adds, `[B, H, n, K, K]`.
    start: `[B, H, K, K]` float32.
    filled: `[B, 1]`, or None.
    change: back: what the boundary's gradient adds after `filled` chunks.

  Returns:
    (where each chunk was reached `[B, H, n, K, K]`; forward: the boundary
    after `filled` chunks, untouched where it is none, or None; the end).
  """
  B, H, K = *start.shape[:2], shape.K
  end = jax.ShapeDtypeStruct(start.shape, jnp.float32)
  boundary = None if back or filled is None else end

  def kernel(shape, *refs):
    _carry_kernel(shape, back, *refs)

  return call(
    kernel, shape, (B, H), (linked.A, linked.kept, G, start, filled, change),
    (array(shape, B, H)(K, K), boundary, end),
    'memory_carry_back' if back else 'memory_carry', WARPS, STAGES,
  )  # fmt: skip


def _carry_kernel(shape: Shape, back, A, kept, G, start, filled, change,
                  each, boundary, end):  # fmt: skip
  b, h = pl.program_id(0), pl.program_id(1)
  dots = shape.dots

  after = functools.partial(reached, (b, h), filled, change, boundary)

  def chunk(step, D):
    i = shape.n - 1 - step if back else step
    D = after(i + 1 if back else i, D)
    put(each, (b, h, i), D)
    dot = dots.nt if back else dots.nn
    moved = dot(D, A[b, h, i]) + G[b, h, i].astype(jnp.float32)
    return kept[b, h, i] * D + moved

  D = jax.lax.fori_loop(0, shape.n, chunk, start[b, h, :, :])
  end[b, h, :, :] = after(0 if back else shape.n, D)


def reached(walk, filled, change, boundary, stop, D):
  """The fast part of a walk after `stop` chunks, see `carry`.

  Where they are the filled ones, it is left in `boundary`, if there is one, and
  changed by what `change` holds.
  """
  b, h = walk

  def put_boundary():
    boundary[b, h, :, :] = D

  if boundary is not None:
    pl.when(stop == filled[b, 0])(put_boundary)
  if change is None:
    return D
  add = lambda D: D + change[b, h, :, :]  # noqa: E731
  return jax.lax.cond(stop == filled[b, 0], add, lambda D: D, D)
