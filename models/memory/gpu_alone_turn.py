"""The walk of a two-layer `mem` alone back over the chunks, see `gpu_alone`.

It takes the gradients E of the fast parts and F of the momenta over a chunk in
four kernels, see `gpu_steps`; of each, a program is a head's slice of the
hidden units. Where the first two end sums over all units are known: of what
reaches U_O, then of the errors. `d_x` is the gradient of x.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_alone_tile as tile
from nestax.models.memory import gpu_deep, gpu_deep_adjoint, gpu_steps
from nestax.models.memory.gpu_alone_tile import Both, Given, Left, Saved
from nestax.models.memory.gpu_deep import Pair
from nestax.models.memory.gpu_layout import Shape, array, put, put_rows

WARPS = 4
BROAD, MANY = 128, 8  # hidden units and warps where a few tiles are enough
ROWS = ('inner', 'u')  # of a slice: U_A times its gradient over the rate; u's


class Turned(NamedTuple):
  """What the walk back finds, `[B, H, n, ...]` in the matmuls' dtype."""

  end: Both  # of what a chunk leaves, [F, K] and [K, F]
  r: jax.Array  # [C, F]
  m: jax.Array  # [C, F]
  e: jax.Array  # [C, K]
  U_inner: jax.Array  # [C, F]
  U_outer: jax.Array  # [C, K]
  eta: jax.Array  # [1, C] float32


class Carried(NamedTuple):
  """What goes from kernel to kernel."""

  d: Both  # gradients of what is carried, float32
  U: jax.Array  # of U_O by the slice, [B, H, slices, C, K]
  e: jax.Array  # of e by the slice, [B, H, slices, C, K]
  u: jax.Array  # [B, H, C, F]
  rows: jax.Array  # [B, H, slices, ROWS, C], float32


def turn(shape: Shape, given: Given, left: Left, saved: Saved, d_left: Left,
         d_end: Both, d_boundary):  # fmt: skip
  """(Turned, gradients of what the first chunk begins with).

  Args:
    shape: of the walk.
    given: what the walk started from.
    left: of the walk.
    saved: of the walk.
    d_left: gradients of `left`.
    d_end: of the end.
    d_boundary: of the fast parts after `given.filled` chunks, or None.
  """
  B, H = given.tokens.k.shape[:2]
  make, C, K, F = array(shape, B, H), shape.C, shape.K, gpu_deep.width(shape)
  pairs = Both(*(x and Pair(make(F, K), make(K, F)) for x in d_end))
  turned = Turned(
    pairs, make(C, F), make(C, F), make(C, K), make(C, F), make(C, K),
    make(1, C, dtype='float32'),
  )  # fmt: skip
  count = gpu_deep.slices(shape)
  part = jnp.zeros((B, H, count, C, K), shape.dtype)
  rows = jnp.zeros((B, H, count, len(ROWS), C), jnp.float32)
  start = Carried(d_end, part, part, jnp.zeros((B, H, C, F), shape.dtype), rows)
  kernels = (
    gpu_steps.Kernel(_over_kernel, 'memory_alone_over', WARPS, count),
    gpu_steps.Kernel(_errors_kernel, 'memory_alone_errors', WARPS, count),
    gpu_steps.Kernel(
      _turn_kernel, 'memory_alone_turn', MANY, gpu_deep.slices(shape, BROAD)
    ),
    gpu_steps.Kernel(_back_kernel, 'memory_alone_back', WARPS, count),
  )
  args = given._replace(start=None), left, saved, d_left, d_boundary
  steps = gpu_steps.Walk(shape, (B, H), args, turned)
  turned, state = steps.run(kernels, start, lambda _, x: x)
  d = state.d
  if d_boundary is not None:  # where no chunk is filled it is the start
    none = (given.filled == 0)[..., None, None]
    fast = jax.tree.map(
      lambda x, y: x + jnp.where(none, y, 0.0), d.fast, d_boundary
    )
    d = d._replace(fast=fast)
  return turned, d


def _place(shape: Shape, step, size=None):
  """(Chunk, a slice of the hidden units, its number) of a program."""
  b, h, j = (pl.program_id(axis) for axis in range(3))
  return (b, h, shape.n - 1 - step[0]), gpu_deep.units(shape, j, size), j


def _after(refs, start: Carried, at, those) -> Both:
  """Gradients of what the chunk leaves."""
  given, *_, d_boundary = refs
  d = tile.part(start.d, at, those)
  if d_boundary is None:
    return d
  b, _, i = at

  def add(fast):
    change = gpu_deep.part(d_boundary, at, those)
    return jax.tree.map(jnp.add, fast, change)

  here = given.filled[b, 0] == i + 1
  return d._replace(fast=jax.lax.cond(here, add, lambda x: x, d.fast))


def _over_kernel(shape: Shape, step, given, left, saved, d_left, d_boundary,
                 start: Carried, turned: Turned, new: Carried):  # fmt: skip
  at, those, j = _place(shape, step)
  (b, h, i), dots = at, shape.dots
  chunk = tile.here(given, at)
  d = _after((given, d_boundary), start, at, those)
  if d_boundary is not None:  # else they are there
    tile.put_part(new.d, at, those, d)
  tile.put_chunk(dots.dtype, turned.end, at, those, d)
  d_U = tile.reached(
    chunk, d, lambda w, x: dots.nt(gpu_deep.times(w, chunk.k), x.inner)
  )
  d_U = d_U + tile.units_of(d_left.U_inner, at, those)
  turned.U_inner[b, h, i, :, those] = d_U.astype(dots.dtype)
  h2 = saved.norms[b, h, i, 0, :]
  act, u, _ = tile.keys(shape, tile.units_of(left.r, at, those), h2)
  below = act.slope * tile.units_of(saved.m, at, those)
  new.rows[b, h, j, 0, :] = jnp.sum(d_U * below, axis=1)
  d_U = tile.reached(
    chunk, d, lambda w, x: dots.nt(gpu_deep.times(w, u), x.outer)
  )
  new.U[b, h, j] = d_U.astype(dots.dtype)


def _gained(shape: Shape, chunk, saved, rows, d_U, at):
  by_inner = gpu_deep.over_slices(shape, rows, at, ROWS.index('inner'))
  return gpu_deep_adjoint.gained(shape, saved, chunk.eta, by_inner, d_U, at)


def _errors_kernel(shape: Shape, step, given, left, saved, d_left, d_boundary,
                   start: Carried, turned: Turned, new: Carried):  # fmt: skip
  at, those, j = _place(shape, step)
  (b, h, i), dots = at, shape.dots
  chunk = tile.here(given, at)
  d_U = gpu_deep.over_slices(shape, start.U, at)
  d_U = (d_U + d_left.U_outer[at].astype(jnp.float32)).astype(dots.dtype)
  pl.when(j == 0)(lambda: put(turned.U_outer, at, d_U))
  gained = _gained(shape, chunk, saved, start.rows, d_U, at)
  h2 = saved.norms[b, h, i, 0, :]
  act, u, _ = tile.keys(shape, tile.units_of(left.r, at, those), h2)
  below = act.slope * tile.units_of(saved.m, at, those)
  d_below = gpu_deep_adjoint.d_below(
    chunk.eta, gained, tile.units_of(turned.U_inner, at, those), below
  )
  d_m = (act.slope * d_below).astype(dots.dtype)
  turned.m[b, h, i, :, those] = d_m
  W = given.slow.outer[h, :, those]
  D = left.start.fast.outer[b, h, i, :, those]
  d_e = gpu_deep.read(dots, d_m, W, D, chunk.alive)
  new.e[b, h, j] = d_e.astype(dots.dtype)
  U = left.U_outer[at]
  d = tile.part(start.d, at, those)
  d_u = tile.reached(chunk, d, lambda w, x: w[:, None] * dots.nn(U, x.outer))
  new.rows[b, h, j, 1, :] = jnp.sum(d_u * u.astype(jnp.float32), axis=1)
  new.u[b, h, :, those] = d_u.astype(dots.dtype)


def _turn_kernel(shape: Shape, step, given, left, saved, d_left, d_boundary,
                 start: Carried, turned: Turned, new: Carried):  # fmt: skip
  at, those, j = _place(shape, step, BROAD)
  (b, h, i), dots = at, shape.dots
  chunk = tile.here(given, at)
  d_U, e = turned.U_outer[at], saved.e[at]
  gained = _gained(shape, chunk, saved, start.rows, d_U, at)
  gain = gained.gain
  d_e = -(chunk.eta / gain.outer)[:, None] * d_U.astype(jnp.float32)
  d_e = d_e + (2.0 * gained.d_e2)[:, None] * e.astype(jnp.float32)
  d_e = (d_e + gpu_deep.over_slices(shape, start.e, at)).astype(dots.dtype)

  @pl.when(j == 0)
  def _():
    put(turned.e, at, d_e)
    steps = gained.by_inner / gain.inner + gained.by_outer / gain.outer
    put_rows(turned.eta, at, (-steps,))

  W = given.slow.outer[h, :, those]
  D = left.start.fast.outer[b, h, i, :, those]
  d_p = gpu_deep.read_back(dots, d_e, W, D, chunk.alive)
  h2 = saved.norms[b, h, i, 0, :]
  act, u, scale = tile.keys(shape, tile.units_of(left.r, at, those), h2)
  d_u = start.u[b, h, :, those].astype(jnp.float32)
  along = gpu_deep.over_slices(shape, start.rows, at, ROWS.index('u'))
  d_h = scale[:, None] * (d_u - along[:, None] * u.astype(jnp.float32))
  d_h = d_h + (2.0 * gained.d_h2)[:, None] * act.value + d_p
  m = tile.units_of(saved.m, at, those)
  d_below = gpu_deep_adjoint.d_below(
    chunk.eta, gained, tile.units_of(turned.U_inner, at, those), act.slope * m
  )
  d_r = act.slope * d_h + act.curve * m * d_below
  d_r = (d_r + tile.units_of(d_left.r, at, those)).astype(dots.dtype)
  turned.r[b, h, i, :, those] = d_r


def _back_kernel(shape: Shape, step, given, left, saved, d_left, d_boundary,
                 start: Carried, turned: Turned, new: Carried):  # fmt: skip
  """From what the chunk leaves to what it begins with."""
  at, those, _ = _place(shape, step)
  (b, h, i), dots = at, shape.dots
  chunk = tile.here(given, at)

  def alive(x):
    return x if chunk.alive is None else gpu_deep.times(chunk.alive, x)

  back = functools.partial(_put_before, chunk, start, d_left, new)
  d_r = alive(turned.r[b, h, i, :, those])
  back('inner', at, (those, slice(None)), dots.tn(d_r, chunk.k))
  outer = dots.tn(alive(saved.e[at]), turned.m[b, h, i, :, those])
  hidden = gpu_deep.gelu(dots, tile.units_of(left.r, at, those)).value
  outer = outer + dots.tn(alive(turned.e[at]), hidden)
  back('outer', at, (slice(None), those), outer)


def _put_before(chunk, start, d_left, new, layer, at, those, found):
  """Gradients of some units of a layer that the chunk begins with."""
  b, h, _ = at
  old, came, refs = (
    Both(*(x and getattr(x, layer) for x in y))
    for y in (start.d, d_left.start, new.d)
  )
  fast = old.fast[(b, h, *those)]
  came_fast = came.fast[(*at, *those)].astype(jnp.float32)
  if old.momentum is not None:
    momentum = chunk.c * fast + chunk.b * old.momentum[(b, h, *those)]
    came_momentum = came.momentum[(*at, *those)].astype(jnp.float32)
    refs.momentum[(b, h, *those)] = momentum + came_momentum
  refs.fast[(b, h, *those)] = chunk.kept * fast + found + came_fast
