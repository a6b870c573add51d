"""The walk back of a two-layer `mem` over the chunks on a GPU.

It takes the gradients E of both layers' fast parts over a chunk, in three
kernels, see `gpu_steps`; of each, a program is a head's slice of the hidden
units. Where one kernel ends sums over all units are known: of the second
layer's system, then of the errors. `d_x` is the gradient of x in `gpu_deep`'s
equations.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import (
  gpu_deep,
  gpu_deep_adjoint,
  gpu_gates,
  gpu_steps,
)
from nestax.models.memory.gpu_deep import Pair
from nestax.models.memory.gpu_deep_adjoint import ROWS, TOKENS, Carried, Turned
from nestax.models.memory.gpu_layout import (
  Shape,
  array,
  put,
  put_rows,
)

WARPS = 4
BROAD, MANY = 128, 8  # hidden units and warps where a few tiles are enough


def turn(shape: Shape, slow, stream, walked, written, read, d_out, d_end,
         d_boundary):  # fmt: skip
  """(Turned, gradients of the first chunk's fast parts).

  Args:
    shape: of the walk.
    slow: slow values.
    stream: inputs.
    walked: of the walk over the matrix memories.
    written: of the walk of `mem`.
    read: of `gpu_deep_output.output_back`.
    d_out: of the output.
    d_end: of the fast parts at the end.
    d_boundary: of those after `stream.filled` chunks, or None.
  """
  B, H = stream.query.shape[0], stream.query.shape[2]
  make, C, K, F = array(shape, B, H), shape.C, shape.K, gpu_deep.width(shape)
  turned = Turned(
    make(F, K), make(C, F), make(C, K), make(C, F), make(C, F), make(C, F),
    make(C, K), make(len(TOKENS), C, dtype='float32'),
  )  # fmt: skip

  count = gpu_deep.slices(shape)
  kernels = (
    gpu_steps.Kernel(_over_kernel, 'memory_deep_over', WARPS, count),
    gpu_steps.Kernel(_errors_kernel, 'memory_deep_errors', WARPS, count),
    gpu_steps.Kernel(
      _turn_kernel, 'memory_deep_turn', MANY, gpu_deep.slices(shape, BROAD)
    ),
  )
  last = gpu_steps.Kernel(_last_kernel, 'memory_deep_last', WARPS, count)
  walked = walked._replace(D=None, D_gates=None, Z=None, Z_gates=None)
  read = read._replace(k=None, total=None)
  args = slow, stream._replace(query=None), walked, written, read, d_out
  steps = gpu_steps.Walk(shape, (B, H), (*args, d_boundary), turned)
  start = _nothing(shape, B, H, d_end)
  turned, state = steps.run(kernels, start, lambda _, x: x, last=last)
  return turned, state.d


def _nothing(shape: Shape, B: int, H: int, d: Pair) -> Carried:
  C, K, count = shape.C, shape.K, gpu_deep.slices(shape)
  part = jnp.zeros((B, H, count, C, K), shape.dtype)
  u = jnp.zeros((B, H, C, gpu_deep.width(shape)), shape.dtype)
  rows = jnp.zeros((B, H, count, len(ROWS), C), jnp.float32)
  return Carried(d, part, part, u, rows)


def _place(shape: Shape, step, size=None):
  """(Chunk, a slice of the hidden units, its number) of a program."""
  b, h, j = (pl.program_id(axis) for axis in range(3))
  return (b, h, shape.n - 1 - step[0]), gpu_deep.units(shape, j, size), j


def _after(shape: Shape, refs, at, those) -> Pair:
  """Gradients of the fast parts after a chunk, from those after the next."""
  *args, change, start, turned = refs
  (b, h, i), stream = at, args[0]

  def after():
    return gpu_deep.part(start.d, at, those)

  def back():
    return gpu_deep_adjoint.back(
      shape, args, after(), turned, (b, h, i + 1), those
    )

  E = jax.lax.cond(i + 1 < shape.n, back, after)
  if change is None:
    return E

  # the boundary is the fast parts as they were after `filled` chunks
  def add(E):
    return jax.tree.map(jnp.add, E, gpu_deep.part(change, at, those))

  return jax.lax.cond(stream.filled[b, 0] == i + 1, add, lambda E: E, E)


def _last_kernel(shape: Shape, step, slow, stream, walked, written, read,
                 d_out, change, start: Carried, turned: Turned,
                 new: Carried):  # fmt: skip
  """From the gradients after the first chunk to those before it."""
  at, those, _ = _place(shape, step)
  refs = stream, walked, written, read, d_out, change, start, turned
  gpu_deep.put_part(new.d, at, those, _after(shape, refs, at, those))


def _over_kernel(shape: Shape, step, slow, stream, walked, written, read,
                 d_out, change, start: Carried, turned: Turned,
                 new: Carried):  # fmt: skip
  at, those, j = _place(shape, step)
  (b, h, i), dots = at, shape.dots
  chunk = gpu_deep.here(shape, stream, walked, at)
  refs = stream, walked, written, read, d_out, change, start, turned
  E = _after(shape, refs, at, those)
  gpu_deep.put_part(new.d, at, those, E)
  turned.E[b, h, i, those, :] = E.inner.astype(dots.dtype)
  last_k = gpu_deep.times(chunk.decay.last, chunk.k)
  d_Z = dots.nt(last_k, E.inner)
  d_Z = d_Z + dots.tn(read.qk[b, h, i], read.r_q[b, h, i, :, those])
  d_rhs = dots.tn(walked.T[b, h, i], d_Z)
  turned.rhs_inner[b, h, i, :, those] = d_rhs.astype(dots.dtype)
  act, u, _ = gpu_deep_adjoint.keys(shape, written, at, those)
  below = act.slope * written.m[b, h, i, :, those].astype(jnp.float32)
  new.rows[b, h, j, 0, :] = jnp.sum(d_rhs * below, axis=1)
  last_u = gpu_deep.times(chunk.decay.last, u)
  new.Z[b, h, j] = dots.nt(last_u, E.outer).astype(dots.dtype)
  D = written.D.outer[b, h, i, :, those].astype(jnp.float32)
  # any token's: the sum over tokens of what is given to one of them
  kept = jnp.sum(D * E.outer)
  new.rows[b, h, j, 1, :] = gpu_gates.at_end(shape.C, kept)


def _errors_kernel(shape: Shape, step, slow, stream, walked, written, read,
                   d_out, change, start: Carried, turned: Turned,
                   new: Carried):  # fmt: skip
  at, those, j = _place(shape, step)
  (b, h, i), dots = at, shape.dots
  chunk = gpu_deep.here(shape, stream, walked, at)
  decay = chunk.decay
  wide_outer = gpu_deep_adjoint.gradient_of_outer(
    shape, written, read, start.Z, at
  )
  d_outer = wide_outer.astype(dots.dtype)
  pl.when(j == 0)(lambda: put(turned.rhs_outer, at, d_outer))
  act, u, _ = gpu_deep_adjoint.keys(shape, written, at, those)
  of = gpu_deep.slice_of(shape, slow, written.D, at, those)

  Z, wide_u = written.Z_outer[b, h, i], u.astype(jnp.float32)
  E = start.d.outer[b, h, :, those]
  d_u = decay.last[:, None] * dots.nn(Z, E)
  new.rows[b, h, j, 2, :] = jnp.sum(d_u * wide_u, axis=1)
  d_system = -decay.eta_g[:, None] * dots.nn(d_outer, of.D.outer)
  new.rows[b, h, j, 3, :] = jnp.sum(d_system * wide_u, axis=1)
  coupling = gpu_gates.coupling(dots, chunk.gate, chunk.marks)
  d_uu = (-coupling * dots.nt(d_outer, Z)).astype(dots.dtype)
  d_u = d_u + d_system + dots.tn(read.hu[b, h, i], read.h_q[b, h, i, :, those])
  d_u = d_u + dots.nn(d_uu, u) + dots.tn(d_uu, u)
  new.rows[b, h, j, 4, :] = jnp.sum(d_u * wide_u, axis=1)
  new.u[b, h, :, those] = d_u.astype(dots.dtype)

  by_inner = gpu_deep_adjoint.row(shape, start.rows, at, 'inner')
  gained = gpu_deep_adjoint.gained(
    shape, written, decay.eta, by_inner, d_outer, at
  )
  below = act.slope * written.m[b, h, i, :, those].astype(jnp.float32)
  d_rhs = turned.rhs_inner[b, h, i, :, those]
  d_m = act.slope * gpu_deep_adjoint.d_below(decay.eta, gained, d_rhs, below)
  d_m = d_m.astype(dots.dtype)
  turned.m[b, h, i, :, those] = d_m
  W, D = of.slow.outer, of.D.outer
  new.e[b, h, j] = gpu_deep.read(dots, d_m, W, D, decay.alive).astype(
    dots.dtype
  )


def _turn_kernel(shape: Shape, step, slow, stream, walked, written, read,
                 d_out, change, start: Carried, turned: Turned,
                 new: Carried):  # fmt: skip
  at, those, j = _place(shape, step, BROAD)
  (b, h, i), dots = at, shape.dots
  chunk = gpu_deep.here(shape, stream, walked, at)
  decay = chunk.decay
  d_outer, e = turned.rhs_outer[b, h, i], written.e[b, h, i]
  by_inner = gpu_deep_adjoint.row(shape, start.rows, at, 'inner')
  gained = gpu_deep_adjoint.gained(
    shape, written, decay.eta, by_inner, d_outer, at
  )
  d_e = -(decay.eta / gained.gain.outer)[:, None] * d_outer.astype(jnp.float32)
  d_e = d_e + (2.0 * gained.d_e2)[:, None] * e.astype(jnp.float32)
  d_e = (d_e + gpu_deep.over_slices(shape, start.e, at)).astype(dots.dtype)

  @pl.when(j == 0)
  def _():
    put(turned.e, at, d_e)
    put_rows(
      turned.tokens,
      at,
      gpu_deep_adjoint.tokens(shape, decay, gained, start.rows, at),
    )

  of = gpu_deep.slice_of(shape, slow, written.D, at, those)
  d_p = gpu_deep.read_back(dots, d_e, of.slow.outer, of.D.outer, decay.alive)
  act, u, scale = gpu_deep_adjoint.keys(shape, written, at, those)
  d_u = start.u[b, h, :, those].astype(jnp.float32)
  along = gpu_deep_adjoint.row(shape, start.rows, at, 'u')[:, None]
  d_h = scale[:, None] * (d_u - along * u.astype(jnp.float32))
  d_h = d_h + (2.0 * gained.d_h2)[:, None] * act.value + d_p
  m = written.m[b, h, i, :, those].astype(jnp.float32)
  d_rhs = turned.rhs_inner[b, h, i, :, those].astype(jnp.float32)
  d_below = gpu_deep_adjoint.d_below(decay.eta, gained, d_rhs, act.slope * m)
  d_r = act.slope * d_h + act.curve * m * d_below
  turned.r[b, h, i, :, those] = d_r.astype(dots.dtype)
  r_v = written.r_v[b, h, i, :, those].astype(jnp.float32)
  values = gpu_deep.gelu(dots, r_v)
  d_r_v = -values.slope * d_p
  turned.r_v[b, h, i, :, those] = d_r_v.astype(dots.dtype)
