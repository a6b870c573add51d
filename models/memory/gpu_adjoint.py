"""The walk back over the gradients of the fast parts, on a GPU.

One program is one head of one sequence. Only what depends on the gradients of
the fast parts after a chunk is computed here, in the terms that
`gpu_backward.prepare` made of the chunk; `d_x` is the gradient of x. Those of
a token's scalars are of logarithms: every product of gates is the exponential
of a difference of sums at two tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_tile
from nestax.models.memory.gpu_backward import scalars_of
from nestax.models.memory.gpu_forward import (
  Shape,
  call,
  fast_of,
  marks_of,
  put_fast,
  saved_of,
  slow_of,
  tokens_of,
)
from nestax.models.memory.gpu_tile import Fast
from nestax.models.memory.types import GATES

WARPS = 8
STAGES = 1


class Turned(NamedTuple):
  """What the walk back found, `[B, H, n, ...]`."""

  d_rhs: tuple  # of the boxes, [C, K]
  d_key: jax.Array  # of keys before their norm, [C, K]
  d_value: jax.Array
  d_logits: jax.Array  # [2, C], float32
  d_rows: jax.Array | None  # right-hand sides of the gates, [gates, C]


def turned_shapes(shape: Shape, B: int, H: int) -> Turned:
  cfg, C, K = shape.cfg, shape.C, shape.K

  def array(*tail, dtype=shape.dtype):
    return jax.ShapeDtypeStruct((B, H, shape.n, *tail), jnp.dtype(dtype))

  rows = array(len(cfg.gates), C, dtype='float32') if cfg.gates else None
  return Turned(
    tuple(array(C, K) for _ in cfg.boxes),
    array(C, K),
    array(C, K),
    array(2, C, dtype='float32'),
    rows,
  )


def turn(shape: Shape, given, stream, saved, prepared, d_boundary, d_running):
  """(Turned, gradients of the first chunk's fast parts `[B, H, R, K]`)."""
  B, H = given.fast.shape[:2]
  narrow = given._replace(maps=given.maps.astype(shape.dtype))
  d_fast = jax.ShapeDtypeStruct(d_running.shape, jnp.float32)
  return call(
    _turn_kernel, shape, (B, H),
    (narrow[:3], stream[1:], saved, prepared, d_boundary, d_running),
    (turned_shapes(shape, B, H), d_fast), 'memory_turn', WARPS, STAGES,
  )  # fmt: skip


def _turn_kernel(shape: Shape, given, stream, saved, prepared, d_boundary,
                 d_running, turned, d_fast_ref):  # fmt: skip
  b, h = pl.program_id(0), pl.program_id(1)
  slow = slow_of(shape, *given, h)
  filled = stream[-1]

  def add_boundary(stop, d_fast):
    """The boundary is the fast parts as they were after `filled` chunks."""
    if d_boundary is None:
      return d_fast

    def add(d_fast):
      return jax.tree.map(jnp.add, d_fast, fast_of(shape, d_boundary, b, h))

    return jax.lax.cond(filled[b, 0] == stop, add, lambda x: x, d_fast)

  def chunk(back, d_fast):
    i = shape.n - 1 - back
    d_fast = add_boundary(i + 1, d_fast)
    return _turn_chunk(
      shape, slow, stream, saved, prepared, turned, (b, h, i), d_fast
    )

  start = fast_of(shape, d_running, b, h)
  d_fast = jax.lax.fori_loop(0, shape.n, chunk, start)
  put_fast(shape, d_fast_ref, b, h, add_boundary(0, d_fast))


def _turn_chunk(shape: Shape, slow, stream, saved, prepared, turned, at,
                d_fast: Fast) -> Fast:  # fmt: skip
  """From the gradients after chunk `at` to those before it."""
  cfg, dots = shape.cfg, shape.dots
  b, h, i = at
  key, value, document, live, _ = stream
  marks = marks_of(document, live, b, i)
  scalars = scalars_of(shape, prepared.scalars, b, h, i)
  gate = scalars.gate
  decay = gpu_tile.decays(gate, marks)
  fast = saved_of(shape, saved, b, h, i)
  k, v = (x[b, h, i].astype(jnp.float32) for x in (prepared.k, prepared.v))
  turned_k = prepared.turned_k[b, h, i]
  eta, alive = decay.eta[:, None], decay.alive

  # the new fast parts
  d_last_k = jnp.zeros_like(k)
  d_kept = jnp.float32(0.0)
  for box, Z in zip(cfg.boxes, prepared.Z):
    d_last_k = d_last_k + dots.nn(Z[b, h, i], d_fast.maps[box])
  for name in cfg.gates:
    d_row = d_fast.rows[name]
    d_last_k = d_last_k + scalars.Z_rows[name][:, None] * d_row[None, :]
    d_kept = d_kept + jnp.sum(d_row * fast.rows[name])
  d_k = decay.last[:, None] * d_last_k
  d_last = jnp.sum(d_k * k, axis=1)
  if prepared.d_k is not None:
    d_k = d_k + prepared.d_k[b, h, i].astype(jnp.float32)

  # the system
  d_enters = jnp.zeros_like(decay.eta)  # of log (eta g_p)
  d_total = scalars.d_total - d_last
  if cfg.delta:
    d_L = dots.nt(turned_k, d_last_k)
    if prepared.d_L is not None:
      d_L = d_L + prepared.d_L[b, h, i].astype(jnp.float32)
    d_kk = -gpu_tile.coupling(gate, marks) * d_L
    of_rows, of_columns = dots.nn(d_kk, k), dots.tn(d_kk, k)
    d_k = d_k + of_rows + of_columns
    # sums over rows and columns of d_kk * (k k^T)
    d_enters = jnp.sum(of_rows * k, axis=1)
    d_total = d_total - jnp.sum(of_columns * k, axis=1)

  # the right-hand sides
  d_lw, d_ld = jnp.zeros_like(k), jnp.zeros_like(k)
  # a target that is the point itself goes with it
  with_point = cfg.objective == 'l2' and cfg.generated
  of_k, of_v = None, None
  keep = prepared.keep[b, h, i]
  before_maps, before_rows = {}, {}
  for j, box in enumerate(cfg.boxes):
    d_map, D = d_fast.maps[box], fast.maps[box]
    d_kept = d_kept + jnp.sum(jnp.sum(d_map * D.astype(jnp.float32), axis=1))
    d_rhs = dots.nt(turned_k, d_map)
    if box == 'mem' and prepared.d_rhs is not None:
      d_rhs = d_rhs + prepared.d_rhs[b, h, i].astype(jnp.float32)
    narrow = d_rhs.astype(shape.dtype)
    turned.d_rhs[j][b, h, i, :, :] = narrow
    d_lw = d_lw + dots.nn(narrow, slow.maps[box])
    d_ld = d_ld + dots.nn(narrow, D)
    if with_point and box in cfg.identity:
      d_lw = d_lw + d_rhs
    else:
      of_v = d_rhs if of_v is None else of_v + d_rhs
      if cfg.objective == 'l2' and box in cfg.identity:
        of_k = d_rhs if of_k is None else of_k + d_rhs
    d_map = decay.kept * d_map + dots.nn(d_map, keep)
    if box == 'mem':
      d_map = d_map + prepared.d_mem[b, h, i].astype(jnp.float32)
    before_maps[box] = d_map
  wide_keep = keep.astype(jnp.float32)
  for j, name in enumerate(cfg.gates):
    d_row = d_fast.rows[name]
    d_rhs = jnp.sum(turned_k.astype(jnp.float32) * d_row[None, :], axis=1)
    turned.d_rows[b, h, i, j, :] = d_rhs
    d_lw = d_lw + d_rhs[:, None] * slow.rows[name][None, :]
    d_ld = d_ld + d_rhs[:, None] * fast.rows[name][None, :]
    kept = jnp.sum(d_row[:, None] * wide_keep, axis=0)
    before_rows[name] = decay.kept * d_row + kept
  both = d_lw + (d_ld if alive is None else alive[:, None] * d_ld)
  d_at = -eta * both
  d_v = jnp.zeros_like(v) if of_v is None else eta * of_v
  d_eta = jnp.sum(d_at * gpu_tile.point(cfg, k, v) + d_v * v, axis=1)
  if of_k is not None:
    of_k = -eta * of_k
    d_k, d_eta = d_k + of_k, d_eta + jnp.sum(of_k * k, axis=1)
  if cfg.delta:
    d_read = -decay.eta_g[:, None] * d_ld
    d_k = d_k + d_read
    d_enters = d_enters + jnp.sum(d_read * k, axis=1)
  if cfg.objective == 'l2':
    d_k = d_k + d_at
  if cfg.generated:
    d_v = d_v - d_at

  # the gates: total and before are sums of log alpha, before leaves out itself
  end = jnp.sum(d_last) + decay.kept * d_kept
  position = gpu_tile.iota(d_total.shape, 0)
  d_total = d_total + jnp.where(position == shape.C - 1, end, 0.0)
  d_sum = d_total + d_enters
  d_alpha = jnp.sum(d_sum) - jnp.cumsum(d_sum) + d_sum - d_enters
  d_logits = {
    'eta': gate.slope_eta * (d_eta + d_enters),
    'alpha': gate.slope_alpha * d_alpha,
  }
  for j, name in enumerate(GATES):
    turned.d_logits[b, h, i, j, :] = d_logits[name]

  # the projections
  k_norm, v_norm = scalars.vec_norms
  d_k = gpu_tile.unit_back(d_k, k, k_norm).astype(shape.dtype)
  d_v = d_v if v_norm is None else gpu_tile.unit_back(d_v, v, v_norm)
  d_v = d_v.astype(shape.dtype)
  turned.d_key[b, h, i, :, :] = d_k
  turned.d_value[b, h, i, :, :] = d_v
  key, value = (tokens_of(shape, x, b, h, i) for x in (key, value))

  def seen(x):
    return x if alive is None else alive[:, None] * x.astype(jnp.float32)

  for box, d_y, x in (('k', d_k, key), ('v', d_v, value)):
    if box in cfg.boxes:
      before_maps[box] = before_maps[box] + dots.tn(d_y, seen(x))
  for name in cfg.gates:
    d_row = jnp.sum(d_logits[name][:, None] * seen(key), axis=0)
    before_rows[name] = before_rows[name] + d_row
  return Fast(before_maps, before_rows)
