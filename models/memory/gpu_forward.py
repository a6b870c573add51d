"""The walk over a stream's chunks as one GPU kernel, forward.

One program is one head of one sequence: it carries the stack of fast parts
from chunk to chunk in registers, and leaves a copy in memory for what reads
single memories.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_gates, gpu_tile
from nestax.models.memory.gpu_layout import (
  Shape,
  anchored,
  call,
  lay,
  marks_of,
  no_offsets,
  pad_rows,
  put,
  put_tokens,
  saved_shapes,
  tokens_of,
)

WARPS = 8
STAGES = 1


def forward(shape: Shape, save: bool, given, stream):
  """Walks from the first chunk to the last.

  Returns:
    ((boundary or None, running, output `[B, n C, H, K]` float32), Saved or
    None). The boundary is wanted where `stream.filled` is given: the fast
    parts after that many chunks, untouched where it is none.
  """
  B, H, R, K = given.fast.shape
  out = jax.ShapeDtypeStruct(stream.query.shape, jnp.float32)
  fast = jax.ShapeDtypeStruct((B, H, 2, shape.N, K), jnp.float32)
  boundary = None
  if stream.filled is not None:
    boundary = jax.ShapeDtypeStruct((B, H, shape.N, K), jnp.float32)
  saved = scratch = None
  if save:
    saved = saved_shapes(shape, B, H)
  else:
    scratch = jax.ShapeDtypeStruct((B, H, shape.N, shape.C), shape.dtype)
  start = pad_rows(shape, given.fast)
  (boundary, running, out), _, saved = call(
    _forward_kernel, shape, (B, H),
    (lay(shape, given), no_offsets(shape), start, stream),
    ((boundary, fast, out), scratch, saved), 'memory_forward', WARPS, STAGES,
  )  # fmt: skip
  boundary = None if boundary is None else boundary[:, :, :R]
  return (boundary, running[:, :, 0, :R], out), saved


def _forward_kernel(
  shape: Shape, slow, zeros, start, stream, ends, scratch, saved
):
  boundary, running, out = ends
  b, h = pl.program_id(0), pl.program_id(1)

  def after(i, D):
    if boundary is not None:

      @pl.when(i == stream.filled[b, 0])
      def _():
        boundary[b, h, :, :] = D

  def chunk(i, D):
    after(i, D)
    at = anchored(zeros, b, h, i)
    running[at[0], at[1], i & 1, :, :] = D
    if saved is not None:
      put(saved.D, at, D)
    shape.barrier()
    refs = slow, running, stream, scratch, saved, out
    return _chunk(shape, refs, at, D)

  D = jax.lax.fori_loop(0, shape.n, chunk, start[b, h, :, :])
  after(shape.n, D)
  shape.barrier()
  running[b, h, 0, :, :] = D


def _vectors(shape: Shape, slow, running, stream, at, alive):
  """Keys and values, `[C, K]` float32, with their reciprocal norms."""
  cfg, dots = shape.cfg, shape.dots
  b, h, i = at

  def box(name, x):
    y = x.astype(jnp.float32)
    if name not in cfg.boxes:
      return y
    rows = shape.box(name)
    out = gpu_tile.read(
      dots, x, slow.stack[h, rows, :], running[b, h, i & 1, rows, :], alive
    )
    return out + y if name in cfg.identity else out

  k, k_norm = gpu_tile.unit(box('k', tokens_of(shape, stream.key, at)))
  v, v_norm = box('v', tokens_of(shape, stream.value, at)), k_norm
  if cfg.value_norm:
    v, v_norm = gpu_tile.unit(v)
  return k, v, k_norm, v_norm


def _chunk(shape: Shape, refs, at, D):
  """Reads chunk `at`; the fast parts after it."""
  cfg, dots = shape.cfg, shape.dots
  slow, running, stream, scratch, saved, out = refs
  b, h, i = at
  marks = marks_of(stream.document, stream.live, at)
  rows = [slow.rows[h, j, :] for j in range(2)]
  biases = [slow.biases[h, j] for j in range(2)]
  fast = {gate: running[b, h, i & 1, shape.gate(gate), :] for gate in cfg.gates}
  key = tokens_of(shape, stream.key, at)
  gate = gpu_gates.gates(cfg, rows, biases, fast, key, marks)
  decay = gpu_gates.decays(gate, marks)
  k, v, k_norm, v_norm = _vectors(shape, slow, running, stream, at, decay.alive)
  side = gpu_tile.sides(cfg, dots, k, v, decay)
  if saved is not None:
    put(saved.k, at, k)
    put(saved.v, at, v)
    for j, row in enumerate((*gate, k_norm, v_norm)):
      saved.scalars[b, h, i, j, :] = row
  T = None
  if cfg.delta:
    L = gpu_gates.coupling(gate, marks) * dots.nt(side.k, side.k)
    T = gpu_tile.inverse(dots, L).astype(dots.dtype)
    if saved is not None:
      put(saved.T, at, T)
  laid = (
    slow.folded[h, i & 1, :, :],
    None if slow.of_value is None else slow.of_value[i & 1, :, :],
    None if slow.of_key is None else slow.of_key[i & 1, :, :],
  )
  Z = gpu_tile.solution(dots, laid, D, side, T).astype(dots.dtype)
  new = decay.kept * D + dots.nn(Z, side.last_k)
  Z_ref, place = (scratch, (b, h)) if saved is None else (saved.Z, at)
  Z_ref[(*place, slice(None), slice(None))] = Z
  shape.barrier()

  mem = shape.box('mem')
  query = tokens_of(shape, stream.query, at).astype(jnp.float32)
  q, _ = gpu_tile.unit(query)
  W, D_mem = slow.stack[h, mem, :], running[b, h, i & 1, mem, :]
  if cfg.read == 'token':
    y = dots.nt(q, W) + dots.nt(decay.g[:, None] * q, D_mem)
    qk = gpu_gates.within(gate, marks) * dots.nt(q, side.k)
    y = y + dots.nt(qk, Z_ref[(*place, mem, slice(None))])
  else:
    y = gpu_tile.read(dots, q, W, D_mem, decay.alive)
  put_tokens(shape, out, at, y + q if 'mem' in cfg.identity else y)
  return new
