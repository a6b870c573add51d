"""The walk forward with momentum on a GPU: `gpu_walk` and `gpu_momentum`.

One program is one head of one sequence; it carries the fast parts and momenta
of the maps that keys and values are read from, and of the gates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_gates, gpu_momentum, gpu_tile, gpu_walk
from nestax.models.memory.gpu_layout import (
  SCALARS,
  Fast,
  Shape,
  anchored,
  anchors,
  array,
  call,
  marks_of,
  put,
  put_rows,
  tokens_of,
)
from nestax.models.memory.gpu_tile import COLUMNS

WARPS = 4
STAGES = 2


class Both(NamedTuple):
  """Fast parts and momenta, or gradients of them."""

  D: Fast
  S: Fast


class Walked(NamedTuple):
  """A chunk as the walk leaves it, `[B, H, n, ...]`."""

  k: jax.Array  # [C, K]
  v: jax.Array
  T: jax.Array | None  # [C, C]
  A_p: jax.Array  # [C, C]
  turned_k: jax.Array | None  # Kt, [C, K]
  ku: jax.Array  # [C, K]
  scalars: jax.Array  # of `gpu_layout` and `gpu_momentum`, [., C], float32
  start: Both | None  # for a backward pass: at the chunk's start, [K, K]


def _shapes(shape: Shape, B: int, H: int, save: bool) -> Walked:
  make, C, K, delta = array(shape, B, H), shape.C, shape.K, shape.cfg.delta
  start = None
  if save:
    maps = {box: make(K, K) for box in shape.carried}
    gates = make(K, COLUMNS) if shape.cfg.gates else None
    start = Both(*[Fast(maps, gates, None)] * 2)
  return Walked(
    make(C, K),
    make(C, K),
    make(C, C) if delta else None,
    make(C, C),
    make(C, K) if delta else None,
    make(C, K),
    make(len(SCALARS) + len(gpu_momentum.MORE), C, dtype='float32'),
    start,
  )


def walk(shape: Shape, save: bool, slow, both: Both, stream):
  """Walks from the first chunk to the last.

  Args:
    shape: of the walk.
    save: what a backward pass needs.
    slow: slow values.
    both: fast parts and momenta at the start, those of `mem` None.
    stream: inputs.

  Returns:
    (Walked, boundary's fast parts or None, Both at the end). The boundary is
    wanted where `stream.filled` is given: after that many chunks, untouched
    where it is none.
  """
  B, H = stream.query.shape[0], stream.query.shape[2]
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), both
  )
  boundary = None if stream.filled is None else like.D
  return call(
    _walk_kernel, shape, (B, H, shape.n if shape.free else 1),
    (slow, both, stream, anchors(shape)),
    (_shapes(shape, B, H, save), boundary, like),
    'memory_momentum_walk', WARPS, STAGES,
  )  # fmt: skip


def _walk_kernel(shape: Shape, slow, both, stream, zeros, walked, boundary,
                 end):  # fmt: skip
  b, h = pl.program_id(0), pl.program_id(1)
  refs = slow, stream, walked
  if shape.free:
    nothing = Both(*[Fast({}, None, None)] * 2)
    _chunk(shape, refs, (b, h, pl.program_id(2)), nothing)
    return

  def keep(refs, tree):
    jax.tree.map(lambda ref, x: gpu_walk.write(ref, (b, h), x), refs, tree)

  def after(i, both):
    if boundary is not None:
      pl.when(i == stream.filled[b, 0])(lambda: keep(boundary, both.D))

  def chunk(i, both):
    after(i, both)
    return _chunk(shape, refs, anchored(zeros, b, h, i), both, zeros[i])

  start = jax.tree.map(lambda ref: ref[b, h, :, :], both)
  both = jax.lax.fori_loop(0, shape.n, chunk, start)
  after(shape.n, both)
  keep(end, both)


def _chunk(shape: Shape, refs, at, both: Both, zero=0) -> Both:
  """Reads chunk `at`; fast parts and momenta after it."""
  cfg, dots = shape.cfg, shape.dots
  slow, stream, walked = refs
  b, h, i = at
  D = both.D
  if walked.start is not None:
    jax.tree.map(lambda ref, x: put(ref, at, x), walked.start, both)
  marks = marks_of(stream, at)
  key = tokens_of(shape, stream.key, at)
  logits = gpu_walk.read_logits(shape, slow, D.gates, key, marks, h)
  gate = gpu_gates.gates(cfg, logits, marks)
  decay = gpu_gates.decays(gate, marks)
  k, k_norm = gpu_walk.read_vector(shape, 'k', slow, D, key, decay.alive, h)
  put(walked.k, at, k)
  value = tokens_of(shape, stream.value, at)
  v, v_norm = gpu_walk.read_vector(shape, 'v', slow, D, value, decay.alive, h)
  put(walked.v, at, v)
  total_b = stream.total_b[b, h, i, :]
  G_p, A_p, c_p, last_A = gpu_momentum.built(dots, gate, decay, total_b, marks)
  put(walked.A_p, at, A_p)
  put_rows(walked.scalars, at, (*gate, k_norm, v_norm, c_p, last_A))
  push = gpu_momentum.push(gate, decay, total_b, c_p, last_A, marks)
  wide_k, wide_v = k.astype(jnp.float32), v.astype(jnp.float32)
  side = gpu_momentum.sides(cfg, dots, wide_k, wide_v, decay, push)
  A_D = A_S = None
  ku = side.last_Ak
  if cfg.delta:
    kk = decay.eta[:, None] * dots.nt(k, k)
    T = gpu_tile.inverse(dots, G_p * kk, zero).astype(dots.dtype)
    put(walked.T, at, T)
    turned_k = dots.tn(T, side.last_k).astype(dots.dtype)
    put(walked.turned_k, at, turned_k)
    ku = push.last_A[:, None] * wide_k - dots.tn(A_p * kk, turned_k)
    ku = ku.astype(dots.dtype)
    if not shape.free:
      A_D = dots.tn(side.ld, turned_k).astype(dots.dtype)
      A_S = dots.tn(side.ls, turned_k).astype(dots.dtype)
  put(walked.ku, at, ku)
  return _written(shape, slow, both, (decay, push, side, ku, A_D, A_S), h)


def _written(shape: Shape, slow, both: Both, chunk, h) -> Both:
  """Fast parts and momenta after a chunk."""
  decay, push, side, ku, A_D, A_S = chunk
  dots = shape.dots
  maps, momenta, gates, gates_S = {}, {}, None, None
  if both.D.gates is not None:
    D, S = both.D.gates, both.S.gates
    U = dots.nn(side.lw, slow.gates[h, :, :]) + dots.nn(side.alive_lw, D)
    U = U.astype(dots.dtype)
    gates = decay.kept * D + push.c_end * S + dots.tn(ku, U)
    if A_D is not None:
      gates = gates + dots.tn(A_D, D) + dots.tn(A_S, S)
    gates_S = push.b_end * S + dots.tn(side.kb, U)
  for box in shape.carried:
    D, S = both.D.maps[box], both.S.maps[box]
    U = dots.nt(slow.folded[box][h, :, :], side.lw) + dots.nt(D, side.alive_lw)
    U = U.astype(dots.dtype)
    new = decay.kept * D + push.c_end * S + dots.nn(U, ku)
    if A_D is not None:
      new = new + dots.nn(D, A_D) + dots.nn(S, A_S)
    maps[box] = new
    momenta[box] = push.b_end * S + dots.nn(U, side.kb)
  return Both(Fast(maps, gates, None), Fast(momenta, gates_S, None))
