"""The walk of a two-layer `mem` over the chunks on a GPU, see `gpu_deep`.

A chunk is three kernels, see `gpu_steps`; of each, a program is a head's slice
of the hidden units, a few tiles of which fit the registers. Where one kernel
ends sums over all units are known: the errors, then their size below.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_deep, gpu_gates, gpu_steps, gpu_tile
from nestax.models.memory.gpu_deep import Pair, Written
from nestax.models.memory.gpu_layout import Shape, array, put, put_rows

WARPS = 4


def _shapes(shape: Shape, B: int, H: int, save: bool) -> Written:
  make, C, K, F = array(shape, B, H), shape.C, shape.K, gpu_deep.width(shape)
  more = None, None, None, None
  if save:
    more = make(C, F), make(C, F), make(C, K), make(C, C)
  rows = make(len(gpu_deep.ROWS), C, dtype='float32')
  D = Pair(make(F, K), make(K, F))
  return Written(D, make(C, F), make(C, F), make(C, K), rows, *more)


def walk(shape: Shape, save: bool, slow: Pair, fast: Pair, stream, walked):
  """Walks from the first chunk to the last.

  Args:
    shape: of the walk.
    save: what a backward pass needs.
    slow: slow values, `[H, ...]`, in the matmuls' dtype.
    fast: fast parts at the start, `[B, H, ...]` float32.
    stream: inputs.
    walked: of the walk over the matrix memories.

  Returns:
    (Written, boundary or None, fast parts at the end), see `gpu_walk.walk`.
  """
  B, H = stream.query.shape[0], stream.query.shape[2]
  boundary = None
  if stream.filled is not None:
    boundary = jax.tree.map(jnp.zeros_like, fast)

  walked = walked._replace(D=None, D_gates=None, Z=None, Z_gates=None)
  count = gpu_deep.slices(shape)
  kernels = (
    gpu_steps.Kernel(_read_kernel, 'memory_deep_walk', WARPS, count),
    gpu_steps.Kernel(_errors_kernel, 'memory_deep_system', WARPS, count + 1),
  )
  last = gpu_steps.Kernel(_last_kernel, 'memory_deep_write', WARPS, count)
  steps = gpu_steps.Walk(
    shape, (B, H), (slow, stream._replace(query=None), walked),
    _shapes(shape, B, H, save),
  )  # fmt: skip
  start = _nothing(shape, B, H, fast), boundary
  written, (carried, boundary) = steps.run(
    kernels, start, lambda _, x: x, last=last
  )
  return written, boundary, carried.D


class Carried(NamedTuple):
  """What goes from kernel to kernel; sums by slices, `[B, H, slices, ...]`."""

  D: Pair  # fast parts, float32
  e: jax.Array  # of the errors, [C, K]
  hD: jax.Array  # of h D_O^T, [C, K]
  hh: jax.Array  # of h h^T, [C, C]
  rows: jax.Array  # of the squared norms of h and b, [2, C], float32
  m: jax.Array  # [B, H, C, F]


def _nothing(shape: Shape, B: int, H: int, D: Pair) -> Carried:
  C, K, count = shape.C, shape.K, gpu_deep.slices(shape)
  zeros = lambda *tail: jnp.zeros((B, H, *tail), shape.dtype)  # noqa: E731
  part = zeros(count, C, K)
  rows = jnp.zeros((B, H, count, 2, C), jnp.float32)
  m = zeros(C, gpu_deep.width(shape))
  return Carried(D, part, part, zeros(count, C, C), rows, m)


def _before(shape: Shape, refs, at, those, j) -> Pair:
  """Fast parts before a chunk: after the one before that has been read."""
  stream, walked, start, written, end = refs
  (b, h, i), (carried, _) = at, start
  D = gpu_deep.part(carried.D, at, those)

  def write(D):
    here = b, h, i - 1
    return _write(shape, stream, walked, carried, written, D, here, those, j)

  D = jax.lax.cond(i > 0, write, lambda D: D, D)
  new, boundary = end
  gpu_deep.put_part(new.D, at, those, D)
  if boundary is not None:
    due = stream.filled[b, 0] == i
    pl.when(due)(lambda: gpu_deep.put_part(boundary, at, those, D))
  return D


def _last_kernel(shape: Shape, step, slow, stream, walked, start, written,
                 end):  # fmt: skip
  at, those, j = gpu_deep.place(shape, step[0])
  _before(shape, (stream, walked, start, written, end), at, those, j)


def _read_kernel(shape: Shape, step, slow, stream, walked, start, written,
                 end):  # fmt: skip
  at, those, j = gpu_deep.place(shape, step[0])
  (b, h, i), dots, new = at, shape.dots, end[0]
  chunk = gpu_deep.here(shape, stream, walked, at)
  alive = chunk.decay.alive
  W = Pair(slow.inner[h, those, :], slow.outer[h, :, those])
  D = _before(shape, (stream, walked, start, written, end), at, those, j)
  written.D.inner[b, h, i, those, :] = D.inner.astype(dots.dtype)
  written.D.outer[b, h, i, :, those] = D.outer.astype(dots.dtype)
  r = gpu_deep.read(dots, chunk.k, W.inner, D.inner, alive).astype(dots.dtype)
  written.r[b, h, i, :, those] = r
  r_v = gpu_deep.read(dots, chunk.v, W.inner, D.inner, alive)
  if written.r_v is not None:
    written.r_v[b, h, i, :, those] = r_v.astype(dots.dtype)
  hidden = gpu_deep.gelu(dots, r.astype(jnp.float32)).value
  p = hidden - gpu_deep.gelu(dots, r_v).value
  e = gpu_deep.read(dots, p, W.outer, D.outer, alive)
  new.e[b, h, j] = e.astype(dots.dtype)
  new.rows[b, h, j, 0, :] = jnp.sum(hidden * hidden, axis=1)
  hidden = hidden.astype(dots.dtype)
  new.hD[b, h, j] = dots.nt(hidden, D.outer).astype(dots.dtype)
  new.hh[b, h, j] = dots.nt(hidden, hidden).astype(dots.dtype)


def _errors(shape: Shape, chunk, parts, at):
  """e, `[C, K]` in float32."""
  e = gpu_deep.over_slices(shape, parts, at) - chunk.v.astype(jnp.float32)
  if 'mem' in shape.cfg.identity:
    e = e + chunk.k.astype(jnp.float32)
  return e


def _errors_kernel(shape: Shape, step, slow, stream, walked, start, written,
                   end):  # fmt: skip
  at, those, j = gpu_deep.place(shape, step[0])
  (b, h, i), dots = at, shape.dots
  count = gpu_deep.slices(shape)

  @pl.when(j < count)
  def _():
    chunk = gpu_deep.here(shape, stream, walked, at)
    e = _errors(shape, chunk, start[0].e, at)
    W, D = slow.outer[h, :, those], start[0].D.outer[b, h, :, those]
    m = gpu_deep.read_back(dots, e, W, D, chunk.decay.alive)
    r = written.r[b, h, i, :, those].astype(jnp.float32)
    below = gpu_deep.gelu(dots, r).slope * m
    end[0].rows[b, h, j, 1, :] = jnp.sum(below * below, axis=1)
    m = m.astype(dots.dtype)
    end[0].m[b, h, :, those] = m
    if written.m is not None:
      written.m[b, h, i, :, those] = m

  @pl.when(j == count)
  def _():
    _system(shape, stream, walked, start[0], written, end[0], at)


def _system(shape: Shape, stream, walked, start: Carried, written, new, at):
  """What the second layer is written with."""
  dots = shape.dots
  chunk = gpu_deep.here(shape, stream, walked, at)
  decay = chunk.decay
  e = _errors(shape, chunk, start.e, at)
  if written.e is not None:
    put(written.e, at, e)
  e2 = jnp.sum(e * e, axis=1)
  h2 = gpu_deep.over_slices(shape, start.rows, at, 0)
  # b2 is known where all slices are through, see `_write`
  put_rows(written.norms, at, (h2, jnp.zeros_like(h2), e2))
  scale = jax.lax.rsqrt(h2 + gpu_deep.EPS)
  uu = gpu_deep.over_slices(shape, start.hh, at)
  uu = uu * scale[:, None] * scale[None, :]
  coupling = gpu_gates.coupling(chunk.gate, chunk.marks)
  T = gpu_tile.inverse(dots, coupling * uu, 0)
  if written.T is not None:
    put(written.T, at, T)
  uD = gpu_deep.over_slices(shape, start.hD, at)
  gain = jnp.sqrt(jnp.maximum(h2, 1.0))
  rhs = -(decay.eta / gain)[:, None] * e - (decay.eta_g * scale)[:, None] * uD
  put(written.Z_outer, at, dots.nn(T, rhs))


def _write(shape: Shape, stream, walked, start: Carried, written, D: Pair, at,
           those, j) -> Pair:  # fmt: skip
  """Fast parts after a chunk."""
  (b, h, i), dots = at, shape.dots
  chunk = gpu_deep.here(shape, stream, walked, at)
  decay = chunk.decay
  h2, _, e2 = gpu_deep.norms_at(written.norms, at)
  b2 = gpu_deep.over_slices(shape, start.rows, at, 1)

  @pl.when(j == 0)
  def _():
    written.norms[b, h, i, gpu_deep.ROWS.index('b2'), :] = b2

  norms = h2, b2, e2
  gain = gpu_deep.gains(*norms)
  r = written.r[b, h, i, :, those].astype(jnp.float32)
  act = gpu_deep.gelu(dots, r)
  below = act.slope * start.m[b, h, :, those].astype(jnp.float32)
  rhs = -(decay.eta / gain.inner)[:, None] * below
  rhs = rhs - decay.eta_g[:, None] * dots.nt(chunk.k, D.inner)
  Z = dots.nn(walked.T[b, h, i], rhs).astype(dots.dtype)
  written.Z_inner[b, h, i, :, those] = Z
  inner = dots.tn(Z, gpu_deep.times(decay.last, chunk.k))
  u, _ = gpu_deep.unit_rows(dots, act.value, h2)
  outer = dots.tn(written.Z_outer[b, h, i], gpu_deep.times(decay.last, u))
  return Pair(decay.kept * D.inner + inner, decay.kept * D.outer + outer)
