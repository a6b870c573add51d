"""What reaches the tokens and slow values by a two-layer `mem` on a GPU.

After the walk back, every chunk by itself; the slow values' gradients are
summed by groups of chunks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_deep, gpu_gates, gpu_tile
from nestax.models.memory.gpu_deep import Pair
from nestax.models.memory.gpu_layout import (
  GROUP,
  Shape,
  array,
  call,
  groups,
  put,
  put_rows,
  tokens_of,
)
from nestax.models.memory.gpu_parts import Parts

WARPS = 4
STAGES = 2
COLLECT = 1  # stages of `collect`: with more its programs run one by one


def parts(shape: Shape, slow, stream, walked, written, read, turned) -> Parts:
  B, H = stream.query.shape[0], stream.query.shape[2]
  make, C, K = array(shape, B, H), shape.C, shape.K
  walked, written = gpu_deep.needed(walked, written)
  none = dict.fromkeys(('r_q', 'h_q', 'q', 'qk', 'hu', 'Z_outer'))
  read = read._replace(**none)
  (parts,) = call(
    _parts_kernel, shape, (shape.n, H, B),
    (slow, stream._replace(query=None), walked, written, read,
     turned._replace(m=None)),
    (Parts(make(C, K), make(C, K), make(3, C, dtype='float32')),),
    'memory_deep_parts', WARPS, STAGES,
  )  # fmt: skip
  return parts


class _Sums(NamedTuple):
  """Over the hidden units; `[C, K]` but for the last three."""

  d_k: jax.Array
  d_v: jax.Array
  d_system: jax.Array
  d_last_k: jax.Array
  d_L: jax.Array  # [C, C], of the first layer's system, its sign turned
  uu: jax.Array  # [C, C]
  d_kept: jax.Array


def _add(shape: Shape, refs, decay, at, j, sums: _Sums) -> _Sums:
  slow, written, turned, h2 = refs
  (b, h, i), those, dots = at, gpu_deep.units(shape, j), shape.dots
  W, D = slow.inner[h, those, :], written.D.inner[b, h, i, those, :]
  E, Z = turned.E[b, h, i, those, :], written.Z_inner[b, h, i, :, those]
  d_rhs = turned.rhs_inner[b, h, i, :, those]
  d_r, d_r_v = (x[b, h, i, :, those] for x in (turned.r, turned.r_v))
  r = written.r[b, h, i, :, those].astype(jnp.float32)
  u, _ = gpu_deep.unit_rows(dots, gpu_deep.gelu(dots, r).value, h2)
  d_kept = jnp.sum(D.astype(jnp.float32) * E.astype(jnp.float32))
  read_back = functools.partial(gpu_deep.read_back, dots)
  return _Sums(
    sums.d_k + read_back(d_r, W, D, decay.alive),
    sums.d_v + read_back(d_r_v, W, D, decay.alive),
    sums.d_system + dots.nn(d_rhs, D),
    sums.d_last_k + dots.nn(Z, E),
    sums.d_L + dots.nt(d_rhs, Z),
    sums.uu + dots.nt(u, u),
    sums.d_kept + d_kept,
  )


def _parts_kernel(shape: Shape, slow, stream, walked, written, read, turned,
                  parts):  # fmt: skip
  i, h, b = (pl.program_id(axis) for axis in range(3))
  at = b, h, i
  dots = shape.dots
  chunk = gpu_deep.here(shape, stream, walked, at)
  decay, k = chunk.decay, chunk.k.astype(jnp.float32)
  refs = slow, written, turned, gpu_deep.norms_at(written.norms, at)[0]
  tokens, tile = (
    jnp.zeros((shape.C, n), jnp.float32) for n in (shape.K, shape.C)
  )
  sums = jax.lax.fori_loop(
    0, gpu_deep.slices(shape),
    lambda j, sums: _add(shape, refs, decay, at, j, sums),
    _Sums(*[tokens] * 4, tile, tile, jnp.float32(0.0)),
  )  # fmt: skip
  d_e = turned.e[b, h, i].astype(jnp.float32)
  d_k = sums.d_k + d_e if 'mem' in shape.cfg.identity else sums.d_k
  put(parts.v, at, sums.d_v - d_e)

  total, enters, eta = (turned.tokens[b, h, i, j, :] for j in range(3))
  d_system = -decay.eta_g[:, None] * sums.d_system
  by_system = jnp.sum(d_system * k, axis=1)
  d_last_k = decay.last[:, None] * sums.d_last_k
  d_last = jnp.sum(d_last_k * k, axis=1)
  end = jnp.sum(d_last) + decay.kept * sums.d_kept
  total = total + read.total[b, h, i, 0, :] + by_system - d_last
  total = total + gpu_gates.at_end(shape.C, end)

  coupling = gpu_gates.coupling(dots, chunk.gate, chunk.marks)
  d_kk = -coupling * sums.d_L
  d_uu = -coupling * dots.nt(
    turned.rhs_outer[b, h, i], written.Z_outer[b, h, i]
  )
  by_both = d_uu * sums.uu + d_kk * dots.nt(chunk.k, chunk.k)
  by_rows, by_columns = (jnp.sum(by_both, axis=axis) for axis in (1, 0))
  d_kk = d_kk.astype(dots.dtype)
  d_k = d_k + dots.nn(d_kk, chunk.k) + dots.tn(d_kk, chunk.k)
  d_k = d_k + d_system + d_last_k + read.k[b, h, i].astype(jnp.float32)
  put(parts.k, at, d_k)
  enters = enters + by_system + by_rows
  put_rows(parts.scalars, at, (total + by_rows - by_columns, enters, eta))


def collect(shape: Shape, stream, walked, written, read, turned, d_out) -> Pair:
  """Gradients of the slow values, `[H, ...]` float32."""
  B, _, H, K = stream.query.shape
  F = gpu_deep.width(shape)

  def sums(*tail):
    return jax.ShapeDtypeStruct((B, H, groups(shape), *tail), jnp.float32)

  walked = walked._replace(T=None, D=None, D_gates=None, Z=None, Z_gates=None)
  written = written._replace(D=None, Z_inner=None, Z_outer=None, m=None, T=None)
  pairs = call(
    _collect_kernel, shape, (groups(shape) * gpu_deep.slices(shape), H, B),
    (stream, walked, written, read.r_q, read.h_q,
     turned._replace(E=None, rhs_inner=None, rhs_outer=None, tokens=None),
     d_out),
    (sums(F, K), sums(K, F)), 'memory_deep_collect', WARPS, COLLECT,
  )  # fmt: skip
  return Pair(*(jnp.sum(x, axis=(0, 2)) for x in pairs))


def _collect_kernel(shape: Shape, stream, walked, written, r_q, h_q, turned,
                    d_out, d_inner, d_outer):  # fmt: skip
  dots, K = shape.dots, shape.K
  program, h, b = (pl.program_id(axis) for axis in range(3))
  group, j = program // gpu_deep.slices(shape), program % gpu_deep.slices(shape)
  those = gpu_deep.units(shape, j)

  def chunk(i, d: Pair):
    at = b, h, i
    query = tokens_of(shape, stream.query, at).astype(jnp.float32)
    q, _ = gpu_tile.unit(query)
    here = lambda ref: ref[b, h, i, :, those]  # noqa: E731
    inner = d.inner + dots.tn(here(turned.r), walked.k[b, h, i])
    inner = inner + dots.tn(here(turned.r_v), walked.v[b, h, i])
    inner = inner + dots.tn(here(r_q), q)
    r, r_v = (here(x).astype(jnp.float32) for x in (written.r, written.r_v))
    p = gpu_deep.gelu(dots, r).value - gpu_deep.gelu(dots, r_v).value
    outer = d.outer + dots.tn(written.e[b, h, i], here(turned.m))
    outer = outer + dots.tn(turned.e[b, h, i], p)
    outer = outer + dots.tn(tokens_of(shape, d_out, at), here(h_q))
    return Pair(inner, outer)

  sizes = (those.size, K), (K, those.size)
  none = Pair(*(jnp.zeros(size, jnp.float32) for size in sizes))
  first = group * GROUP
  last = jnp.minimum(first + GROUP, shape.n)
  d = jax.lax.fori_loop(first, last, chunk, none)
  d_inner[b, h, group, those, :] = d.inner
  d_outer[b, h, group, :, those] = d.outer
