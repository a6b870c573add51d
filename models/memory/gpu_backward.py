"""Before the walk back on a GPU: every chunk by itself.

`prepare` lays out what the walk back needs of a chunk in the shape in which
it needs it. With `Kt = T^T last_k`, the gradients of the right-hand sides are
linear in those of the fast parts after the chunk, `d_rhs = dD Kt^T`, so that
T itself, the gradients of Z and their product with Z never have to be formed
there; `keep = Kt^T ld` takes dD back over the chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_gates, gpu_tile
from nestax.models.memory.gpu_layout import (
  Saved,
  Shape,
  array,
  call,
  lay,
  marks_of,
  put,
  put_tokens,
  scalars_of,
  tokens_of,
)

WARPS = 4
STAGES = 1


class Prepared(NamedTuple):
  """A chunk as the walk back wants it, `[B, H, n, ...]`; None: nothing."""

  turned_k: jax.Array  # T^T last_k, [C, K]
  keep: jax.Array  # [K, K]
  d_k: jax.Array | None  # by the output, [C, K]
  d_rhs: jax.Array | None  # of `mem`, by the output, [C, K]
  d_L: jax.Array | None  # by the output, its sign turned, [C, C]
  d_mem: jax.Array  # of the fast part of `mem`, by the output, [K, K]
  d_total: jax.Array  # by the output, [1, C], float32


def prepared_shapes(shape: Shape, B: int, H: int) -> Prepared:
  make, C, K = array(shape, B, H), shape.C, shape.K
  token = shape.cfg.read == 'token'
  return Prepared(
    make(C, K),
    make(K, K),
    make(C, K) if token else None,
    make(C, K) if token else None,
    make(C, C) if token and shape.cfg.delta else None,
    make(K, K),
    make(1, C, dtype='float32'),
  )


def prepare(shape: Shape, given, stream, saved: Saved, d_out):
  """(Prepared, gradient of the query)."""
  B, H = given.fast.shape[:2]
  d_query = jax.ShapeDtypeStruct(stream.query.shape, stream.query.dtype)
  marks = stream.document, stream.live
  return call(
    _prepare_kernel, shape, (shape.n, H, B),
    (lay(shape, given).stack, stream.query, marks, saved, d_out),
    (prepared_shapes(shape, B, H), d_query), 'memory_prepare', WARPS, STAGES,
  )  # fmt: skip


def _prepare_kernel(shape: Shape, W_ref, query, marks, saved, d_out_ref,
                    prepared, d_query):  # fmt: skip
  cfg, dots = shape.cfg, shape.dots
  i, h, b = (pl.program_id(axis) for axis in range(3))
  at = b, h, i
  marks = marks_of(*marks, at)
  gate, *_ = scalars_of(shape, saved, at)
  decay = gpu_gates.decays(gate, marks)
  k, v = (x[b, h, i].astype(jnp.float32) for x in (saved.k, saved.v))
  side = gpu_tile.sides(cfg, dots, k, v, decay)
  T = saved.T[b, h, i] if cfg.delta else None
  turned_k = side.last_k
  if cfg.delta:
    turned_k = dots.tn(T, turned_k).astype(shape.dtype)
  put(prepared.turned_k, at, turned_k)
  put(prepared.keep, at, dots.tn(turned_k, side.ld))

  mem = shape.box('mem')
  q, q_norm = gpu_tile.unit(tokens_of(shape, query, at).astype(jnp.float32))
  d_out = tokens_of(shape, d_out_ref, at)
  d_q = dots.nn(d_out, W_ref[h, mem, :])
  if 'mem' in cfg.identity:
    d_q = d_q + d_out
  d_fast = dots.nn(d_out, saved.D[b, h, i, mem, :])
  d_out = d_out.astype(shape.dtype)
  if cfg.read != 'token':
    alive = 1.0 if decay.alive is None else decay.alive[:, None]
    d_q = d_q + alive * d_fast
    put(prepared.d_mem, at, dots.tn(d_out, alive * q))
    prepared.d_total[b, h, i, 0, :] = jnp.zeros_like(decay.g)
    put_tokens(shape, d_query, at, gpu_tile.unit_back(d_q, q, q_norm))
    return
  d_fast = decay.g[:, None] * d_fast
  d_q = d_q + d_fast
  d_total = jnp.sum(q * d_fast, axis=1)
  G, k, Z = gpu_gates.within(gate, marks), side.k, saved.Z[b, h, i, mem, :]
  d_qk = (G * dots.nn(d_out, Z)).astype(shape.dtype)
  of_q, of_k = dots.nn(d_qk, k), dots.tn(d_qk, q)
  # sums over rows and columns of d_qk * (q k^T)
  d_total = d_total + jnp.sum(of_q * q, axis=1)
  d_total = d_total - jnp.sum(of_k * k.astype(jnp.float32), axis=1)
  prepared.d_total[b, h, i, 0, :] = d_total
  put(prepared.d_k, at, of_k)
  put_tokens(shape, d_query, at, gpu_tile.unit_back(d_q + of_q, q, q_norm))
  d_rhs = dots.tn(G * dots.nt(q, k), d_out)
  d_rhs = dots.tn(T, d_rhs) if cfg.delta else d_rhs
  d_rhs = d_rhs.astype(shape.dtype)
  put(prepared.d_rhs, at, d_rhs)
  if cfg.delta:
    put(prepared.d_L, at, dots.nn(d_rhs, Z))
  d_mem = dots.tn(d_out, decay.g[:, None] * q) + dots.tn(d_rhs, side.ld)
  put(prepared.d_mem, at, d_mem)
