"""After the walk back on a GPU: every chunk by itself.

`collect` takes what the walk back found and finishes: the gradients of the
slow values, summed by groups of chunks, and of the inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_gates, gpu_momentum, gpu_tile
from nestax.models.memory.gpu_layout import (
  Fast,
  Shape,
  call,
  groups,
  marks_of,
  over_group,
  put_tokens,
  query_of,
  scalars_of,
  tokens_of,
)
from nestax.models.memory.gpu_tile import COLUMNS

WARPS = 4
STAGES = 2


class Walked(NamedTuple):
  """What is read here of the walk forward, `[B, H, n, ...]`."""

  k: jax.Array  # [C, K]
  v: jax.Array
  scalars: jax.Array
  D: Fast | None  # at the chunk's start, `mem` None
  turned_k: jax.Array | None  # keys as fast parts take steps, [C, K]


def collect(shape: Shape, slow, stream, walked: Walked, turned):
  """Gradients: (maps, gates' as memories, gates' as read), key, value.

  The slow ones, but for that of `mem`, are summed by groups of chunks,
  `[B, H, groups, ...]`.
  """
  B, _, H, K = stream.query.shape

  def sums(*tail):
    return jax.ShapeDtypeStruct((B, H, groups(shape), *tail), jnp.float32)

  d_tokens = tuple(
    jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (stream.key, stream.value)
  )
  return call(
    _collect_kernel, shape, (groups(shape), H, B),
    (slow, stream, walked, turned),
    (({box: sums(K, K) for box in shape.carried},
      sums(K, COLUMNS) if shape.cfg.gates else None,
      sums(K, COLUMNS) if shape.own_gates else None), d_tokens),
    'memory_collect', WARPS, 1 if shape.cfg.momentum else STAGES,
  )  # fmt: skip


def collect_mem(shape: Shape, stream, walked: Walked, d_rhs, d_out):
  """Gradient of the slow value of `mem`, by groups, `[B, H, groups, K, K]`.

  `d_rhs` is that of its right-hand sides, see `gpu_parts`.
  """
  B, _, H, K = stream.query.shape
  return call(
    _collect_mem_kernel, shape, (groups(shape), H, B),
    (stream, walked._replace(D=None, turned_k=None), d_rhs, d_out),
    jax.ShapeDtypeStruct((B, H, groups(shape), K, K), jnp.float32),
    'memory_collect_mem', WARPS, STAGES,
  )  # fmt: skip


def _collect_mem_kernel(shape: Shape, stream, walked, d_rhs, d_out, d_W):
  dots = shape.dots
  group, h, b = (pl.program_id(axis) for axis in range(3))

  def chunk(at, d):
    b, h, i = at
    q, _ = query_of(shape, stream, at)
    if gpu_tile.has_point(shape.cfg):
      lw = _left_side(shape, stream, walked, at)
      d = d + dots.tn(d_rhs[b, h, i], lw)
    return d + dots.tn(tokens_of(shape, d_out, at), q)

  zero = jnp.zeros((shape.K, shape.K), jnp.float32)
  d_W[b, h, group, :, :] = over_group(shape, chunk, zero)


def _left_side(shape: Shape, stream, walked, at):
  """lw of `gpu_tile.sides`."""
  b, h, i = at
  gate = scalars_of(shape, walked.scalars, at)[0]
  decay = gpu_gates.decays(gate, marks_of(stream, at))
  k, v = (x[b, h, i].astype(jnp.float32) for x in (walked.k, walked.v))
  lw = -decay.eta[:, None] * gpu_tile.point(shape.cfg, k, v)
  return lw.astype(shape.dtype)


def _collect_kernel(shape: Shape, slow, stream, walked, turned, sums, d_tokens):
  group, h, b = (pl.program_id(axis) for axis in range(3))
  # read once: they stay in shared memory
  maps = {box: slow.maps[box][h, :, :] for box in shape.carried}
  refs = slow.rows, stream, walked, turned, d_tokens
  zeros = jax.tree.map(lambda ref: jnp.zeros(ref.shape[3:], jnp.float32), sums)
  d_slow = over_group(
    shape, lambda at, x: _collect_chunk(shape, maps, refs, at, x), zeros
  )
  jax.tree.map(lambda ref, x: _write(ref, (b, h, group), x), sums, d_slow)


def _write(ref, place, x):
  ref[(*place, slice(None), slice(None))] = x


def _collect_chunk(shape: Shape, slow, refs, at, d_slow):
  cfg, dots = shape.cfg, shape.dots
  slow_rows, stream, walked, turned, d_tokens = refs
  b, h, i = at
  maps, gates, rows = dict(d_slow[0]), *d_slow[1:]
  marks = marks_of(stream, at)
  decay = gpu_gates.decays(scalars_of(shape, walked.scalars, at)[0], marks)
  k, v = (x[b, h, i].astype(jnp.float32) for x in (walked.k, walked.v))
  lw = (-decay.eta[:, None] * gpu_tile.point(cfg, k, v)).astype(shape.dtype)
  key, value = (tokens_of(shape, x, at) for x in stream[1:3])
  across = []
  if not shape.free:
    # d_rhs lw for the others, whose d_rhs is `E turned_k^T`
    turned_k = dots.tn(walked.turned_k[b, h, i], lw).astype(shape.dtype)
    across.append((turned.E, turned_k))
    if cfg.momentum:
      kb = gpu_momentum.key_b(shape, k, stream, at)
      across.append((turned.F, dots.tn(kb, lw).astype(shape.dtype)))
  d_logits = gpu_tile.columns(
    [turned.d_logits[b, h, i, j, :] for j in range(2)]
  )
  for box, x, ref, d_x_ref in (
    ('k', key, turned.d_key, d_tokens[0]),
    ('v', value, turned.d_value, d_tokens[1]),
  ):
    d_y = ref[b, h, i]
    d_x = d_y.astype(jnp.float32)
    if box in cfg.boxes:
      back = dots.nn(d_y, walked.D.maps[box][b, h, i])
      back = back if decay.alive is None else decay.alive[:, None] * back
      back = back + dots.nn(d_y, slow[box])
      d_x = d_x + back if box in cfg.identity else back
      maps[box] = maps[box] + dots.tn(d_y, x)
      for E, moved in across:
        maps[box] = maps[box] + dots.nn(E.maps[box][b, h, i], moved)
    if box == 'k' and rows is not None:
      d_x = d_x + dots.nt(d_logits, slow_rows[h, :, :])
      if walked.D.gates is not None:
        back = dots.nt(d_logits, walked.D.gates[b, h, i])
        alive = decay.alive
        d_x = d_x + (back if alive is None else alive[:, None] * back)
    put_tokens(shape, d_x_ref, at, d_x)
  if gates is not None:
    for E, moved in across:
      gates = gates + dots.tn(moved, E.gates[b, h, i])
  if rows is not None:
    rows = rows + dots.tn(key, d_logits)
  return maps, gates, rows
