"""The walk of a two-layer `mem` over the chunks on a GPU, see `gpu_deep`.

A program is a head of a sequence. It goes over a chunk by slices of the hidden
units, a few tiles of which fit the registers; the fast parts stay in memory,
in place, and so does what one turn over the slices leaves for the next. After
the first the errors are known, after the second their size below.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_deep, gpu_gates, gpu_steps, gpu_tile
from nestax.models.memory.gpu_deep import Pair, Written
from nestax.models.memory.gpu_layout import (
  Shape,
  anchored,
  anchors,
  array,
  put,
  put_rows,
)

WARPS = 8


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
  shapes = _shapes(shape, B, H, save)
  m = None  # for the next turn over the slices
  if not save:
    m = array(shape._replace(n=1), B, H)(shape.C, gpu_deep.width(shape))
  (written, _), (D, boundary) = gpu_steps.through(
    _walk_kernel, shape, (B, H),
    (slow, stream._replace(query=None), walked, anchors(shape)),
    (shapes, m), (fast, boundary), 'memory_deep_walk', WARPS,
  )  # fmt: skip
  return written, boundary, D


class _Sums(NamedTuple):
  """Over the hidden units."""

  e: jax.Array  # of the errors, [C, K]
  hD: jax.Array  # h D_O^T, [C, K]
  hh: jax.Array  # h h^T, [C, C]
  h2: jax.Array  # [C]


def _walk_kernel(shape: Shape, slow, stream, walked, zeros, outs, state):
  b, h = pl.program_id(0), pl.program_id(1)
  (written, m), (D, boundary) = outs, state

  keep = functools.partial(gpu_deep.keep, shape, stream.filled, boundary, D)

  def chunk(i, _):
    keep((b, h, i))
    at = anchored(zeros, b, h, i)
    refs = slow, stream, walked, written, (written.m, at) if m is None else (
      m, (b, h, 0)
    ), D  # fmt: skip
    _chunk(shape, refs, at, zeros[i])

  jax.lax.fori_loop(0, shape.n, chunk, None)
  keep((b, h, shape.n))


def _chunk(shape: Shape, refs, at, zero):
  slow, stream, walked, written, (m_ref, m_at), D = refs
  dots, count = shape.dots, gpu_deep.slices(shape)
  chunk = gpu_deep.here(shape, stream, walked, at)
  alive = chunk.decay.alive
  row = jnp.zeros((shape.C,), jnp.float32)
  tile, square = (
    jnp.zeros((shape.C, n), jnp.float32) for n in (shape.K, shape.C)
  )
  sums = jax.lax.fori_loop(
    0, count, lambda j, sums: _read(shape, refs, chunk, at, j, sums),
    _Sums(tile, tile, square, row),
  )  # fmt: skip
  gpu_steps.settle(shape)
  e = sums.e - chunk.v.astype(jnp.float32)
  if 'mem' in shape.cfg.identity:
    e = e + chunk.k.astype(jnp.float32)
  narrow_e = e.astype(dots.dtype)

  def below(j, b2):
    those = gpu_deep.units(shape, j)
    W = slow.outer[at[1], :, those]
    outer = D.outer[(*at[:2], slice(None), those)]
    m = gpu_deep.read_back(dots, narrow_e, W, outer, alive)
    r = written.r[(*at, slice(None), those)].astype(jnp.float32)
    b = gpu_deep.gelu(dots, r).slope * m
    m_ref[(*m_at, slice(None), those)] = m.astype(dots.dtype)
    return b2 + jnp.sum(b * b, axis=1)

  b2 = jax.lax.fori_loop(0, count, below, row)
  e2 = jnp.sum(e * e, axis=1)
  put_rows(written.norms, at, (sums.h2, b2, e2))
  T, Z_outer = _system(shape, chunk, e, sums, zero)
  put(written.Z_outer, at, Z_outer)
  for ref, x in ((written.e, e), (written.T, T)):
    if ref is not None:
      put(ref, at, x)
  gpu_steps.settle(shape)
  gain = gpu_deep.gains(shape, sums.h2, b2, e2)
  T = walked.T[at]

  def write(j, _):
    _write(shape, refs, chunk, (gain, sums.h2, T, Z_outer), at, j)

  jax.lax.fori_loop(0, count, write, None)
  gpu_steps.settle(shape)


def _read(shape: Shape, refs, chunk, at, j, sums: _Sums) -> _Sums:
  """What a slice of the hidden units is at the keys and values."""
  slow, _, _, written, _, D_ref = refs
  dots, alive = shape.dots, chunk.decay.alive
  those = gpu_deep.units(shape, j)
  W = Pair(slow.inner[at[1], those, :], slow.outer[at[1], :, those])
  D = gpu_deep.part(D_ref, at, those)
  written.D.inner[(*at, those, slice(None))] = D.inner.astype(dots.dtype)
  written.D.outer[(*at, slice(None), those)] = D.outer.astype(dots.dtype)
  r = gpu_deep.read(dots, chunk.k, W.inner, D.inner, alive).astype(dots.dtype)
  written.r[(*at, slice(None), those)] = r
  r_v = gpu_deep.read(dots, chunk.v, W.inner, D.inner, alive)
  if written.r_v is not None:
    written.r_v[(*at, slice(None), those)] = r_v.astype(dots.dtype)
  hidden = gpu_deep.gelu(dots, r.astype(jnp.float32)).value
  p = hidden - gpu_deep.gelu(dots, r_v).value
  narrow = hidden.astype(dots.dtype)
  return _Sums(
    sums.e + gpu_deep.read(dots, p, W.outer, D.outer, alive),
    sums.hD + dots.nt(narrow, D.outer),
    sums.hh + dots.nt(narrow, narrow),
    sums.h2 + jnp.sum(hidden * hidden, axis=1),
  )


def _system(shape: Shape, chunk, e, sums: _Sums, zero):
  """(T_O, what the second layer is written with)."""
  dots, decay = shape.dots, chunk.decay
  scale = jax.lax.rsqrt(sums.h2 + gpu_deep.EPS)
  uu = sums.hh * scale[:, None] * scale[None, :]
  coupling = gpu_gates.coupling(dots, chunk.gate, chunk.marks)
  T = gpu_tile.inverse(dots, coupling * uu, zero).astype(dots.dtype)
  gain = jnp.sqrt(jnp.maximum(sums.h2, 1.0))
  rhs = -(decay.eta / gain)[:, None] * e
  rhs = rhs - (decay.eta_g * scale)[:, None] * sums.hD
  return T, dots.nn(T, rhs).astype(dots.dtype)


def _write(shape: Shape, refs, chunk, known, at, j) -> None:
  """A slice of the fast parts after the chunk."""
  _, _, _, written, (m_ref, m_at), D_ref = refs
  gain, h2, T, Z_outer = known
  dots, decay, those = shape.dots, chunk.decay, gpu_deep.units(shape, j)
  D = gpu_deep.part(D_ref, at, those)
  act = gpu_deep.gelu(
    dots, written.r[(*at, slice(None), those)].astype(jnp.float32)
  )
  m = m_ref[(*m_at, slice(None), those)].astype(jnp.float32)
  rhs = -(decay.eta / gain.inner)[:, None] * (act.slope * m)
  rhs = rhs - decay.eta_g[:, None] * dots.nt(chunk.k, D.inner)
  Z = dots.nn(T, rhs).astype(dots.dtype)
  written.Z_inner[(*at, slice(None), those)] = Z
  inner = dots.tn(Z, gpu_deep.times(decay.last, chunk.k))
  u, _ = gpu_deep.unit_rows(dots, act.value, h2)
  outer = dots.tn(Z_outer, gpu_deep.times(decay.last, u))
  new = Pair(decay.kept * D.inner + inner, decay.kept * D.outer + outer)
  gpu_deep.put_part(D_ref, at, those, new)
