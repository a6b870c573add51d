"""Before the walk back on a GPU: every chunk by itself.

`prepare` computes a chunk again from its saved fast parts and lays out what
the walk back needs in the shape in which it needs it. With `Kt = T^T (last
k)`, the gradients of a memory's right-hand side are linear in those of its
fast part after the chunk, `d_rhs = Kt dD^T`, so that T itself, the gradients
of Z and their product with Z never have to be formed there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_tile
from nestax.models.memory.gpu_forward import (
  Shape,
  call,
  marks_of,
  saved_of,
  slow_of,
  tokens_of,
)
from nestax.models.memory.gpu_tile import Fast, Gates, Slow

PREPARE = {'warps': 4, 'stages': 1}
SCALARS = (
  'log_eta',
  'total',
  'before',
  'slope_eta',
  'slope_alpha',
  'k_norm',
  'v_norm',
  'd_total',
)


class Prepared(NamedTuple):
  """A chunk as the walk back wants it, `[B, H, n, ...]`; None: nothing."""

  k: jax.Array  # [C, K]
  v: jax.Array
  turned_k: jax.Array  # T^T (last k)
  Z: tuple  # of the boxes
  d_k: jax.Array | None  # by the output
  d_rhs: jax.Array | None  # of `mem`, by the output
  d_L: jax.Array | None  # [C, C], by the output, its sign turned
  keep: jax.Array  # [K, K], by which fast parts' gradients go back
  d_mem: jax.Array  # [K, K], of the fast part of `mem`, by the output
  scalars: jax.Array  # [SCALARS + gates, C], float32


class Scalars(NamedTuple):
  """Rows of `Prepared.scalars`."""

  gate: Gates
  vec_norms: tuple
  d_total: jax.Array
  Z_rows: dict


def scalars_of(shape: Shape, scalars, b, h, i) -> Scalars:
  rows = [scalars[b, h, i, j, :] for j in range(len(SCALARS))]
  names = dict(zip(SCALARS, rows))
  gate = Gates(*(names[name] for name in Gates._fields))
  first = len(SCALARS)
  Z_rows = {
    g: scalars[b, h, i, first + j, :] for j, g in enumerate(shape.cfg.gates)
  }
  v_norm = names['v_norm'] if shape.cfg.value_norm else None
  return Scalars(gate, (names['k_norm'], v_norm), names['d_total'], Z_rows)


def prepared_shapes(shape: Shape, B: int, H: int) -> Prepared:
  cfg, C, K = shape.cfg, shape.C, shape.K
  token_read = cfg.read == 'token'

  def array(*tail, dtype=shape.dtype):
    return jax.ShapeDtypeStruct((B, H, shape.n, *tail), jnp.dtype(dtype))

  return Prepared(
    *(array(C, K) for _ in range(3)),
    tuple(array(C, K) for _ in cfg.boxes),
    array(C, K) if token_read else None,
    array(C, K) if token_read else None,
    array(C, C) if token_read and cfg.delta else None,
    array(K, K),
    array(K, K),
    array(len(SCALARS) + len(cfg.gates), C, dtype='float32'),
  )


def prepare(shape: Shape, given, stream, saved, d_out):
  """(Prepared, gradient of the query)."""
  B, H = given.fast.shape[:2]
  narrow = given._replace(maps=given.maps.astype(shape.dtype))
  d_query = jax.ShapeDtypeStruct(stream.query.shape, stream.query.dtype)
  return call(
    _prepare_kernel, shape, (shape.n, H, B),
    (narrow[:3], stream[:5], saved, d_out),
    (prepared_shapes(shape, B, H), d_query), 'memory_prepare', **PREPARE,
  )  # fmt: skip


class Read(NamedTuple):
  """Gradients by a chunk's output."""

  d_q: jax.Array
  d_k: jax.Array | None
  d_Z: jax.Array | None  # of `mem`
  d_mem: jax.Array
  d_total: jax.Array


def _output_back(cfg, dots, slow: Slow, fast: Fast, q, k, decay, G, Z, d_out):
  """Of `gpu_tile.output`."""
  W, D = slow.maps['mem'], fast.maps['mem']
  d_q = dots.nn(d_out, W)
  if 'mem' in cfg.identity:
    d_q = d_q + d_out
  d_fast = dots.nn(d_out, D)
  if cfg.read != 'token':
    x = q
    if decay.alive is not None:
      x, d_fast = decay.alive[:, None] * x, decay.alive[:, None] * d_fast
    none = jnp.zeros_like(decay.eta)
    return Read(d_q + d_fast, None, None, dots.tn(d_out, x), none)
  d_fast = decay.g[:, None] * d_fast
  d_total = jnp.sum(q * d_fast, axis=1)
  d_qk = G * dots.nt(d_out, Z)
  of_q, of_k = dots.nn(d_qk, k), dots.tn(d_qk, q)
  # sums over rows and columns of d_qk * (q k^T)
  d_total = d_total + jnp.sum(of_q * q, axis=1) - jnp.sum(of_k * k, axis=1)
  d_Z = dots.tn(G * dots.nt(q, k), d_out)
  d_mem = dots.tn(d_out, decay.g[:, None] * q)
  return Read(d_q + d_fast + of_q, of_k, d_Z, d_mem, d_total)


def _prepare_kernel(shape: Shape, given, stream, saved, d_out_ref, prepared,
                    d_query):  # fmt: skip
  cfg, dots = shape.cfg, shape.dots
  i, h, b = (pl.program_id(axis) for axis in range(3))
  query, key, value, document, live = stream
  slow = slow_of(shape, *given, h)
  fast = saved_of(shape, saved, b, h, i)
  marks = marks_of(document, live, b, i)
  key, value = (tokens_of(shape, x, b, h, i) for x in (key, value))
  gate = gpu_tile.gates(cfg, slow, fast, key, marks)
  decay = gpu_tile.decays(gate, marks)
  vec = gpu_tile.vectors(cfg, dots, slow, fast, key, value, decay.alive)

  def put(ref, x):
    ref[b, h, i, :, :] = x.astype(ref.dtype)

  put(prepared.k, vec.k_CxK)
  put(prepared.v, vec.v_CxK)
  solve = gpu_tile.system(cfg, dots, vec, decay, gpu_tile.coupling(gate, marks))
  turned_k = solve.last_k_CxK
  if cfg.delta:
    turned_k = dots.tn(solve.T_CxC, turned_k)
  put(prepared.turned_k, turned_k)
  put(prepared.keep, dots.tn(turned_k, solve.ld_CxK))
  for ref, box in zip(prepared.Z, cfg.boxes):
    Z = gpu_tile.writes(cfg, dots, box, slow.maps[box], fast.maps[box], solve)
    put(ref, Z)
  # Z is that of `mem`, the last box

  query = tokens_of(shape, query, b, h, i)
  q, q_norm = gpu_tile.unit(query.astype(jnp.float32))
  d_out = tokens_of(shape, d_out_ref, b, h, i)
  back = _output_back(
    cfg,
    dots,
    slow,
    fast,
    q,
    solve.k_CxK,
    decay,
    gpu_tile.within(gate, marks),
    Z.astype(shape.dtype),
    d_out,
  )

  d_q = gpu_tile.unit_back(back.d_q, q, q_norm).astype(d_query.dtype)
  d_query[b, pl.ds(i * shape.C, shape.C), h, :] = d_q
  d_rhs, d_mem = back.d_Z, back.d_mem
  if d_rhs is not None:
    d_rhs = dots.tn(solve.T_CxC, d_rhs) if cfg.delta else d_rhs
    d_mem = d_mem + dots.tn(d_rhs, solve.ld_CxK)
    put(prepared.d_rhs, d_rhs)
    put(prepared.d_k, back.d_k)
  if prepared.d_L is not None:
    put(prepared.d_L, dots.nt(d_rhs, Z))
  put(prepared.d_mem, d_mem)
  v_norm = vec.k_norm if vec.v_norm is None else vec.v_norm
  rows = (*gate, vec.k_norm, v_norm, back.d_total)
  Z_rows = (
    gpu_tile.writes_row(slow.rows[g], fast.rows[g], solve) for g in cfg.gates
  )
  for j, row in enumerate((*rows, *Z_rows)):
    prepared.scalars[b, h, i, j, :] = row
