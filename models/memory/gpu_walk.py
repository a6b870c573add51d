"""The walk over a stream's chunks on a GPU: what has to be in order.

One program is one head of one sequence. It carries the memories that keys,
values and gates are read from, in registers; what a chunk writes into `mem`
and what it puts out follows from what is left here, all chunks at once.
Where nothing is carried, one program is one chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_gates, gpu_tile
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
STAGES = 3


class Walked(NamedTuple):
  """A chunk as the walk leaves it, `[B, H, n, ...]`."""

  k: jax.Array  # [C, K]
  v: jax.Array
  T: jax.Array | None  # [C, C]
  scalars: jax.Array  # [SCALARS, C], float32
  # for a backward pass, else None
  D: dict[str, jax.Array] | None  # fast parts at its start, [K, K]
  D_gates: jax.Array | None  # [K, COLUMNS]
  Z: dict[str, jax.Array] | None  # [K, C]
  Z_gates: jax.Array | None  # [C, COLUMNS]


def walked_shapes(shape: Shape, B: int, H: int, save: bool) -> Walked:
  make, C, K = array(shape, B, H), shape.C, shape.K
  gates = save and shape.cfg.gates
  return Walked(
    make(C, K),
    make(C, K),
    make(C, C) if shape.cfg.delta else None,
    make(len(SCALARS), C, dtype='float32'),
    {box: make(K, K) for box in shape.carried} if save else None,
    make(K, COLUMNS) if gates else None,
    {box: make(K, C) for box in shape.carried} if save else None,
    make(C, COLUMNS) if gates else None,
  )


def walk(shape: Shape, save: bool, slow, fast: Fast, stream):
  """Walks from the first chunk to the last.

  Args:
    shape: of the walk.
    save: what a backward pass needs.
    slow: slow values.
    fast: fast parts at the start, those of `mem` None.
    stream: inputs.

  Returns:
    (Walked, boundary or None, fast parts at the end). The boundary is wanted
    where `stream.filled` is given: the fast parts after that many chunks,
    untouched where it is none.
  """
  B, H = stream.query.shape[0], stream.query.shape[2]
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), fast
  )
  boundary = None if stream.filled is None else like
  return call(
    _walk_kernel, shape, (B, H, shape.n if shape.free else 1),
    (slow, fast, stream, anchors(shape)),
    (walked_shapes(shape, B, H, save), boundary, like),
    'memory_walk', WARPS, STAGES,
  )  # fmt: skip


def _walk_kernel(shape: Shape, slow, fast, stream, zeros, walked, boundary,
                 end):  # fmt: skip
  b, h = pl.program_id(0), pl.program_id(1)
  refs = slow, stream, walked
  if shape.free:
    _chunk(shape, refs, (b, h, pl.program_id(2)), Fast({}, None, None))
    return

  def keep(refs, D):
    jax.tree.map(lambda ref, x: write(ref, (b, h), x), refs, D)

  def after(i, D):
    if boundary is not None:
      pl.when(i == stream.filled[b, 0])(lambda: keep(boundary, D))

  def chunk(i, D):
    after(i, D)
    return _chunk(shape, refs, anchored(zeros, b, h, i), D, zeros[i])

  start = jax.tree.map(lambda ref: ref[b, h, :, :], fast)
  D = jax.lax.fori_loop(0, shape.n, chunk, start)
  after(shape.n, D)
  keep(end, D)


def write(ref, place, x):
  ref[(*place, slice(None), slice(None))] = x


def read_gates(shape: Shape, slow, D_gates, stream, key, marks, at):
  """The gates of chunk `at`."""
  logits = _logits(shape, slow, D_gates, key, marks, at[1])
  handed = (
    None if x is None else x[(*at, slice(None))]
    for x in (stream.log_eta, stream.log_alpha)
  )
  return gpu_gates.gates(shape.cfg, logits, tuple(handed), marks)


def _logits(shape: Shape, slow, D_gates, key, marks, h):
  """Of eta and alpha, `[C]`; None where none is read."""
  if slow.rows is None:
    return None, None
  dots, rows = shape.dots, slow.rows[h, :, :]
  if D_gates is None:
    y = dots.exact(key, rows)
  elif marks.document is None:
    y = dots.exact(key, rows + D_gates)
  else:
    alive = (marks.document == 0).astype(jnp.float32)
    y = dots.exact(key, rows) + alive[:, None] * dots.exact(key, D_gates)
  return [gpu_tile.column(y, j) + slow.biases[h, j] for j in range(2)]


def read_vector(shape: Shape, box, slow, D: Fast, x, alive, h):
  """Keys or values `[C, K]` in the matmuls' dtype, their reciprocal norms."""
  cfg, y = shape.cfg, x.astype(jnp.float32)
  if box in cfg.boxes:
    W = slow.maps[box][h, :, :]
    out = gpu_tile.read(shape.dots, x, W, D.maps[box], alive)
    y = out + y if box in cfg.identity else out
  norm = jnp.ones((shape.C,), jnp.float32)
  if cfg.key_norm if box == 'k' else cfg.value_norm:
    y, norm = gpu_tile.unit(y)
  return y.astype(shape.dtype), norm


def _chunk(shape: Shape, refs, at, D: Fast, zero=0) -> Fast:
  """Reads chunk `at`; the fast parts after it."""
  cfg, dots = shape.cfg, shape.dots
  slow, stream, walked = refs
  h = at[1]
  marks = marks_of(stream, at)
  if walked.D is not None:
    for box, ref in walked.D.items():
      put(ref, at, D.maps[box])
  if walked.D_gates is not None:
    put(walked.D_gates, at, D.gates)
  key = tokens_of(shape, stream.key, at)
  gate = read_gates(shape, slow, D.gates, stream, key, marks, at)
  decay = gpu_gates.decays(gate, marks)
  k, k_norm = read_vector(shape, 'k', slow, D, key, decay.alive, h)
  put(walked.k, at, k)
  value = tokens_of(shape, stream.value, at)
  v, v_norm = read_vector(shape, 'v', slow, D, value, decay.alive, h)
  put(walked.v, at, v)
  put_rows(walked.scalars, at, (*gate, k_norm, v_norm))
  T = None
  if cfg.delta:
    L = gpu_gates.coupling(dots, gate, marks) * dots.nt(k, k)
    T = gpu_tile.inverse(dots, L, zero).astype(dots.dtype)
    put(walked.T, at, T)
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  side = gpu_tile.sides(cfg, dots, k, v, decay)
  gates = None
  if D.gates is not None:
    rhs = dots.nn(side.lw, slow.gates[h, :, :]) + dots.nn(side.ld, D.gates)
    Z = (rhs if T is None else dots.nn(T, rhs)).astype(dots.dtype)
    if walked.Z_gates is not None:
      put(walked.Z_gates, at, Z)
    gates = decay.kept * D.gates + dots.tn(side.last_k, Z)
  maps = {}
  for box in shape.carried:
    rhs = _right_side(shape, box, slow, D, k, v, decay, side, h, zero)
    Z = (rhs if T is None else dots.nt(rhs, T)).astype(dots.dtype)
    if walked.Z is not None:
      put(walked.Z[box], at, Z)
    maps[box] = decay.kept * D.maps[box] + dots.nn(Z, side.last_k)
  return Fast(maps, gates, None)


def _right_side(shape, box, slow, D, k, v, decay, side, h, zero):
  """Of the system of one memory, `[K, C]`."""
  cfg, dots = shape.cfg, shape.dots
  rhs = dots.nt(slow.maps[box][h, :, :], side.lw)
  rhs = rhs + dots.nt(D.maps[box], side.ld)
  if gpu_tile.at_point(cfg, box):
    return rhs + gpu_tile.turned_round(dots, side.lw, zero)
  target = gpu_tile.target(cfg, box, k, v, decay.eta)
  return rhs + gpu_tile.turned_round(dots, target, zero)
