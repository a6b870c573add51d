"""The walk forward with momentum on a GPU: `gpu_walk` and `gpu_momentum`.

A kernel takes the fast parts and momenta of the maps that keys and values are
read from, and of the gates, over one chunk, in two kernels, see `gpu_steps`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import (
  gpu_gates,
  gpu_momentum,
  gpu_steps,
  gpu_tile,
  gpu_walk,
)
from nestax.models.memory.gpu_layout import (
  SCALARS,
  Fast,
  Shape,
  array,
  call,
  marks_of,
  put,
  put_rows,
  tokens_of,
)
from nestax.models.memory.gpu_tile import COLUMNS

WARPS = 4


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
  shapes = _shapes(shape, B, H, save)
  boundary = None
  if stream.filled is not None:
    boundary = jax.tree.map(jnp.zeros_like, both.D)
  if shape.free:
    (walked,) = call(
      _free_kernel, shape, (B, H, shape.n), (slow, stream), (shapes,),
      'memory_momentum_walk', WARPS, 1,
    )  # fmt: skip
    return walked, boundary, both

  def kept(chunks, state):
    """Where so many chunks fill the tokens this is the boundary."""
    both, boundary = state
    if boundary is None:
      return state
    due = (stream.filled == chunks)[:, :, None, None]
    keep = lambda old, x: jnp.where(due, x, old)  # noqa: E731
    return both, jax.tree.map(keep, boundary, both.D)

  kernels = (
    gpu_steps.Kernel(_read_kernel, 'memory_momentum_walk', WARPS),
    gpu_steps.Kernel(_write_kernel, 'memory_momentum_write', WARPS),
  )
  steps = gpu_steps.Walk(shape, (B, H), (slow, stream), shapes)
  walked, state = steps.run(kernels, (both, boundary), kept)
  both, boundary = kept(shape.n, state)
  return walked, boundary, both


def _free_kernel(shape: Shape, slow, stream, walked):
  at = tuple(pl.program_id(axis) for axis in range(3))
  _read(shape, (slow, stream, walked), at, Fast({}, None, None))


def _read_kernel(shape: Shape, step, slow, stream, start, walked, _):
  b, h, i = pl.program_id(0), pl.program_id(1), step[0]
  both = jax.tree.map(lambda ref: ref[b, h, :, :], start[0])
  if walked.start is not None:
    jax.tree.map(lambda ref, x: put(ref, (b, h, i), x), walked.start, both)
  _read(shape, (slow, stream, walked), (b, h, i), both.D)


def _read(shape: Shape, refs, at, D: Fast):
  """What chunk `at` writes with: keys, values, gates, the system, turned."""
  cfg, dots = shape.cfg, shape.dots
  slow, stream, walked = refs
  b, h, i = at
  marks = marks_of(stream, at)
  key = tokens_of(shape, stream.key, at)
  gate = gpu_walk.read_gates(shape, slow, D.gates, stream, key, marks, at)
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
  wide_k = k.astype(jnp.float32)
  ku = last_A[:, None] * wide_k
  if cfg.delta:
    kk = decay.eta[:, None] * dots.nt(k, k)
    T = gpu_tile.inverse(dots, G_p * kk, 0).astype(dots.dtype)
    put(walked.T, at, T)
    turned_k = dots.tn(T, decay.last[:, None] * wide_k).astype(dots.dtype)
    put(walked.turned_k, at, turned_k)
    ku = ku - dots.tn(A_p * kk, turned_k)
  put(walked.ku, at, ku)


def _write_kernel(shape: Shape, step, slow, stream, start, walked, end):
  """Fast parts and momenta after a chunk."""
  b, h, i = at = pl.program_id(0), pl.program_id(1), step[0]
  dots, both = shape.dots, start[0]
  chunk = gpu_momentum.here(shape, stream, walked, at)
  decay, push = chunk.decay, chunk.push
  side, ku = gpu_momentum.sides_of(shape, chunk), walked.ku[b, h, i]
  A_D = A_S = None
  if shape.cfg.delta:
    turned_k = walked.turned_k[b, h, i]
    A_D = dots.tn(side.ld, turned_k).astype(dots.dtype)
    A_S = dots.tn(side.ls, turned_k).astype(dots.dtype)

  def write(D_ref, S_ref, ends, W, map_, turn, errors=None):
    D, S = D_ref[b, h, :, :], S_ref[b, h, :, :]
    U = map_(W, side.lw) + map_(D, side.alive_lw)
    U = (U if errors is None else U + errors).astype(dots.dtype)
    new = decay.kept * D + push.c_end * S + turn(U, ku)
    if A_D is not None:
      new = new + turn(D, A_D) + turn(S, A_S)
    gpu_walk.write(ends[0], (b, h), new)
    gpu_walk.write(ends[1], (b, h), push.b_end * S + turn(U, side.kb))

  if both.D.gates is not None:
    # a memory a column
    write(
      both.D.gates, both.S.gates, [x.gates for x in end[0]],
      slow.gates[h, :, :], lambda x, side: dots.nn(side, x),
      lambda x, side: dots.tn(side, x),
    )  # fmt: skip
  for box in shape.carried:
    write(
      both.D.maps[box], both.S.maps[box], [x.maps[box] for x in end[0]],
      slow.maps[box][h, :, :], dots.nt, dots.nn,
      gpu_tile.turned_round(dots, side.lw),
    )  # fmt: skip
