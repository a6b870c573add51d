"""What queries read from a two-layer `mem` on a GPU, every chunk by itself.

r_q = q A^T + g q D_A^T + (G * q k^T) Z_A,      h_q = gelu(r_q)
o   = h_q O^T + g h_q D_O^T + (G * h_q u^T) Z_O
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_deep, gpu_gates, gpu_tile
from nestax.models.memory.gpu_layout import (
  Shape,
  array,
  call,
  put,
  put_rows,
  put_tokens,
  tokens_of,
)

WARPS = 4
BACK = 32  # hidden units at a time on the way back, which adds up more
STAGES = 2


class Read(NamedTuple):
  """What a chunk's output sends back, `[B, H, n, ...]`.

  Of the fast parts, `u` and `Z_inner` it are products that the walk back
  computes itself: it reads less so.
  """

  r_q: jax.Array  # gradient, [C, F]
  h_q: jax.Array  # [C, F], no gradient
  q: jax.Array  # g q, no gradient, [C, K]
  qk: jax.Array  # G * q k^T, no gradient, [C, C]
  hu: jax.Array  # gradient of h_q u^T, [C, C]
  Z_outer: jax.Array  # gradient, [C, K]
  k: jax.Array  # gradient, [C, K]
  total: jax.Array  # [1, C], see `gpu_adjoint.Tokens`


def output(shape: Shape, slow, stream, walked, written):
  """`[B, n C, H, K]` float32."""
  B, _, H, _ = stream.query.shape
  return call(
    _output_kernel, shape, (shape.n, H, B),
    (slow, stream, *gpu_deep.needed(walked, written)),
    jax.ShapeDtypeStruct(stream.query.shape, jnp.float32),
    'memory_deep_output', WARPS, STAGES,
  )  # fmt: skip


class _Asked(NamedTuple):
  """What a chunk's queries meet, whatever the hidden units."""

  q: jax.Array  # unit, float32
  norm: jax.Array
  G: jax.Array  # [C, C]
  qk: jax.Array  # [C, C], times G
  h2: jax.Array  # squared norms of the keys' hidden units


class _Units(NamedTuple):
  """What some hidden units are, `[C, SLICE]` and their weights."""

  of: gpu_deep.Slice
  Z: jax.Array
  u: jax.Array
  query: gpu_deep.Gelu


def _ask(shape: Shape, stream, written, chunk, at) -> _Asked:
  dots = shape.dots
  query = tokens_of(shape, stream.query, at).astype(jnp.float32)
  q, norm = gpu_tile.unit(query)
  G = gpu_gates.within(dots, chunk.gate, chunk.marks)
  qk = (G * dots.nt(q, chunk.k)).astype(dots.dtype)
  return _Asked(q, norm, G, qk, gpu_deep.norms_at(written.norms, at)[0])


def _units(shape: Shape, slow, written, asked, chunk, at, those) -> _Units:
  (b, h, i), dots = at, shape.dots
  of = gpu_deep.slice_of(shape, slow, written.D, at, those)
  Z = written.Z_inner[b, h, i, :, of.units]
  r = dots.nt(asked.q, of.slow.inner)
  r = r + dots.nt(chunk.decay.g[:, None] * asked.q, of.D.inner)
  r = r + dots.nn(asked.qk, Z)
  key = written.r[b, h, i, :, of.units].astype(jnp.float32)
  u, _ = gpu_deep.unit_rows(dots, gpu_deep.gelu(dots, key).value, asked.h2)
  return _Units(of, Z, u, gpu_deep.gelu(dots, r))


def _output_kernel(shape: Shape, slow, stream, walked, written, out):
  i, h, b = (pl.program_id(axis) for axis in range(3))
  at = b, h, i
  dots = shape.dots
  chunk = gpu_deep.here(shape, stream, walked, at)
  g = chunk.decay.g[:, None]
  asked = _ask(shape, stream, written, chunk, at)

  def add(j, sums):
    y, hu = sums
    those = gpu_deep.units(shape, j)
    those = _units(shape, slow, written, asked, chunk, at, those)
    h_q = those.query.value
    y = y + dots.nt(h_q, those.of.slow.outer)
    y = y + dots.nt(g * h_q, those.of.D.outer)
    return y, hu + dots.nt(h_q, those.u)

  none = (
    jnp.zeros((shape.C, shape.K), jnp.float32),
    jnp.zeros((shape.C, shape.C), jnp.float32),
  )
  y, hu = jax.lax.fori_loop(0, gpu_deep.slices(shape), add, none)
  y = y + dots.nn(asked.G * hu, written.Z_outer[b, h, i])
  put_tokens(shape, out, at, y + asked.q if _adds(shape) else y)


def _adds(shape: Shape) -> bool:
  return 'mem' in shape.cfg.identity


def output_back(shape: Shape, slow, stream, walked, written, d_out):
  """(Read, gradient of the query)."""
  B, _, H, K = stream.query.shape
  make, C, F = array(shape, B, H), shape.C, gpu_deep.width(shape)
  read = Read(
    make(C, F), make(C, F), make(C, K), make(C, C), make(C, C), make(C, K),
    make(C, K), make(1, C, dtype='float32'),
  )  # fmt: skip
  return call(
    _output_back_kernel, shape, (shape.n, H, B),
    (slow, stream, *gpu_deep.needed(walked, written), d_out),
    (read, jax.ShapeDtypeStruct(stream.query.shape, stream.query.dtype)),
    'memory_deep_output_back', WARPS, STAGES,
  )  # fmt: skip


class _Sums(NamedTuple):
  """Over the hidden units."""

  hu: jax.Array  # [C, C], h_q u^T
  d_qk: jax.Array  # [C, C]
  d_q: jax.Array  # [C, K]
  total: jax.Array  # [C]


def _output_back_kernel(shape: Shape, slow, stream, walked, written, d_out_ref,
                        read: Read, d_query):  # fmt: skip
  i, h, b = (pl.program_id(axis) for axis in range(3))
  at = b, h, i
  dots = shape.dots
  chunk = gpu_deep.here(shape, stream, walked, at)
  asked = _ask(shape, stream, written, chunk, at)
  g, d_out = chunk.decay.g[:, None], tokens_of(shape, d_out_ref, at)
  wide_out, d_out = d_out, d_out.astype(dots.dtype)
  put(read.qk, at, asked.qk)
  put(read.q, at, g * asked.q)
  d_hu = asked.G * dots.nt(d_out, written.Z_outer[b, h, i])
  d_hu = d_hu.astype(dots.dtype)
  put(read.hu, at, d_hu)

  def add(j, sums: _Sums) -> _Sums:
    those = gpu_deep.units(shape, j, BACK)
    those = _units(shape, slow, written, asked, chunk, at, those)
    W, D = those.of.slow, those.of.D
    h_q, slope, _ = those.query
    read.h_q[b, h, i, :, those.of.units] = h_q.astype(dots.dtype)
    d_h = g * dots.nn(d_out, D.outer) + dots.nn(d_hu, those.u)
    total = sums.total + jnp.sum(d_h * h_q, axis=1)
    d_r = slope * (dots.nn(d_out, W.outer) + d_h)
    d_r = d_r.astype(dots.dtype)
    read.r_q[b, h, i, :, those.of.units] = d_r
    d_q = g * dots.nn(d_r, D.inner)
    return _Sums(
      sums.hu + dots.nt(h_q, those.u),
      sums.d_qk + dots.nt(d_r, those.Z),
      sums.d_q + d_q + dots.nn(d_r, W.inner),
      total + jnp.sum(d_q * asked.q, axis=1),
    )

  tile = jnp.zeros((shape.C, shape.C), jnp.float32)
  none = _Sums(tile, tile, jnp.zeros_like(asked.q), jnp.zeros_like(g[:, 0]))
  sums = jax.lax.fori_loop(0, gpu_deep.slices(shape, BACK), add, none)
  put(read.Z_outer, at, dots.tn(asked.G * sums.hu, d_out))
  total = sums.total - jnp.sum(sums.hu * d_hu.astype(jnp.float32), axis=0)
  d_qk = (asked.G * sums.d_qk).astype(dots.dtype)
  d_k, d_q = dots.tn(d_qk, asked.q), dots.nn(d_qk, chunk.k)
  put(read.k, at, d_k)
  total = total + jnp.sum(d_q * asked.q, axis=1)
  total = total - jnp.sum(d_k * chunk.k.astype(jnp.float32), axis=1)
  put_rows(read.total, at, (total,))
  d_q = sums.d_q + d_q
  d_q = d_q + wide_out if _adds(shape) else d_q
  put_tokens(shape, d_query, at, gpu_tile.unit_back(d_q, asked.q, asked.norm))
