"""The walk back on a GPU: gradients of what keys, values and gates read.

One program is one head of one sequence; it carries the gradients of the fast
parts that `gpu_walk` carries. What comes by `mem` and the output it finds in
`gpu_parts.Parts`. Where nothing is carried, one program is one chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_adjoint, gpu_gates, gpu_tile
from nestax.models.memory.gpu_layout import (
  NARROW,
  Fast,
  Shape,
  anchored,
  anchors,
  array,
  call,
  marks_of,
  put,
  put_rows,
  scalars_of,
  tokens_of,
)
from nestax.models.memory.gpu_tile import COLUMNS
from nestax.models.memory.types import GATES

WARPS = 4
STAGES = 2


class Turned(NamedTuple):
  """What the walk back found, `[B, H, n, ...]`."""

  E: Fast  # of the fast parts after the chunk, [K, K]; `mem` None
  d_key: jax.Array  # of keys before their norm, [C, K]
  d_value: jax.Array
  d_logits: jax.Array  # [2, C], float32


def turn(shape: Shape, slow, stream, saved, parts, d_end: Fast, d_boundary):
  """(Turned, gradients of the first chunk's fast parts).

  Args:
    shape: of the walk.
    slow: slow values.
    stream: inputs.
    saved: of the forward pass.
    parts: of the tokens by `mem`.
    d_end: of the fast parts at the end, `mem` None.
    d_boundary: of those after `stream.filled` chunks, or None.
  """
  B, H = stream.query.shape[0], stream.query.shape[2]
  make, C, K = array(shape, B, H), shape.C, shape.K
  E = Fast(
    {box: make(K, K) for box in shape.carried},
    make(K, COLUMNS) if shape.cfg.gates else None,
    None,
  )
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), d_end
  )
  walked = saved.walked._replace(T=None)
  return call(
    _turn_kernel, shape, (B, H, shape.n if shape.free else 1),
    (slow, stream, walked, saved.linked, parts, d_end, d_boundary,
     anchors(shape)),
    (Turned(E, make(C, K), make(C, K), make(2, C, dtype='float32')), like),
    'memory_turn', WARPS, STAGES,
  )  # fmt: skip


def _turn_kernel(shape: Shape, slow, stream, walked, linked, parts, d_end,
                 d_boundary, zeros, turned, d_start):  # fmt: skip
  b, h = pl.program_id(0), pl.program_id(1)
  refs = slow, stream, walked, linked, parts, turned
  if shape.free:
    _chunk(shape, refs, (b, h, pl.program_id(2)), Fast({}, None, None), {})
    return

  def reached(stop, E):
    """The boundary is the fast parts as they were after `filled` chunks."""
    if d_boundary is None:
      return E

    def add(E):
      return jax.tree.map(lambda x, ref: x + ref[b, h, :, :], E, d_boundary)

    return jax.lax.cond(stream.filled[b, 0] == stop, add, lambda E: E, E)

  # read once, to stay in shared memory, where there is room
  maps = None
  if shape.K <= NARROW:
    maps = {box: slow.maps[box][h, :, :] for box in shape.carried}

  def chunk(back, E):
    i = shape.n - 1 - back
    at = anchored(zeros, b, h, i)
    return _chunk(shape, refs, at, reached(i + 1, E), maps)

  E = jax.tree.map(lambda ref: ref[b, h, :, :], d_end)
  E = reached(0, jax.lax.fori_loop(0, shape.n, chunk, E))
  jax.tree.map(lambda ref, x: _write(ref, (b, h), x), d_start, E)


def _write(ref, place, x):
  ref[(*place, slice(None), slice(None))] = x


def _chunk(shape: Shape, refs, at, E: Fast, slow_maps) -> Fast:
  """From the gradients after chunk `at` to those before it."""
  slow, stream, walked, linked, parts, turned = refs
  b, h, i = at
  marks = marks_of(stream, at)
  gate, k_norm, v_norm = scalars_of(shape, walked.scalars, at)
  decay = gpu_gates.decays(gate, marks)
  narrow = jax.tree.map(lambda x: x.astype(shape.dtype), E)
  jax.tree.map(lambda ref, x: put(ref, at, x), turned.E, narrow)
  k, v = walked.k[b, h, i], walked.v[b, h, i]
  tokens = gpu_adjoint.none(shape)
  if not shape.free:
    E, reached = _over(shape, refs, decay, at, E, narrow, slow_maps)
    tokens = _tokens(shape, refs, decay, at, k, v, reached)
  d_k, d_v = (x[b, h, i].astype(jnp.float32) for x in (parts.k, parts.v))
  rows = [parts.scalars[b, h, i, j, :] for j in range(3)]
  tokens = tokens + gpu_adjoint.Tokens(d_k, d_v, *rows)
  gradients = finish(shape, turned, at, tokens, gate, k, v, k_norm, v_norm)
  return read_back(shape, stream, decay, at, E, *gradients)


def finish(shape: Shape, turned, at, tokens, gate, k, v, k_norm, v_norm):
  """Writes gradients of keys, values and logits, and returns them."""
  d_logits = gpu_adjoint.logits_back(gate, tokens)
  put_rows(turned.d_logits, at, d_logits)
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  d_k = gpu_tile.settled(shape.dots, tokens.k)
  d_k = gpu_tile.unit_back(d_k, k, k_norm).astype(shape.dtype)
  put(turned.d_key, at, d_k)
  d_v = gpu_tile.settled(shape.dots, tokens.v)
  d_v = gpu_tile.unit_back(d_v, v, v_norm).astype(shape.dtype)
  put(turned.d_value, at, d_v)
  return d_k, d_v, d_logits


def _over(shape: Shape, refs, decay, at, E: Fast, narrow: Fast, slow_maps):
  """Through the memories, one after the other: a memory's tiles are many.

  Returns:
    (of the fast parts before the chunk by those after; what reaches the tokens:
    of what is kept, of the keys that are written, of ld, of lw and of the
    `rhs^T` of memories whose target is not the point).
  """
  dots, (slow, _, walked, linked, *_) = shape.dots, refs
  b, h, i = at
  turned_k = linked.turned_k[b, h, i]
  tile = jnp.zeros((shape.C, shape.K), jnp.float32)
  d_kept, d_last_k, d_ld, d_lw = 0.0, tile, tile, tile
  maps, gates, d_rhs = {}, None, {}
  for box, d in E.maps.items():
    D, d_narrow = walked.D[box][b, h, i], narrow.maps[box]
    d_kept = d_kept + jnp.sum(d * D.astype(jnp.float32))
    d_last_k = d_last_k + dots.tn(walked.Z[box][b, h, i], d_narrow)
    d_rhs[box] = dots.nt(turned_k, d_narrow)
    maps[box] = decay.kept * d + dots.nt(d_narrow, linked.A[b, h, i])
    d_ld = d_ld + dots.nn(d_rhs[box], D)
    W = slow_maps[box] if slow_maps else slow.maps[box][h, :, :]
    d_lw = d_lw + dots.nn(d_rhs[box], W)
    if gpu_tile.at_point(shape.cfg, box):
      d_lw = d_lw + d_rhs.pop(box)
  if E.gates is not None:
    D = walked.D_gates[b, h, i]
    d_kept = d_kept + jnp.sum(E.gates * D.astype(jnp.float32))
    gates = decay.kept * E.gates + dots.nn(linked.A[b, h, i], narrow.gates)
    d_last_k = d_last_k + dots.nt(walked.Z_gates[b, h, i], narrow.gates)
    of_gates = dots.nn(turned_k, narrow.gates)
    d_ld = d_ld + dots.nt(of_gates, D)
    d_lw = d_lw + dots.nt(of_gates, slow.gates[h, :, :])
  return Fast(maps, gates, None), (d_kept, d_last_k, d_ld, d_lw, d_rhs)


def _tokens(shape: Shape, refs, decay, at, k, v, reached):
  """What reaches the tokens by the memories carried here, see `_over`."""
  d_kept, d_last_k, d_ld, d_lw, d_rhs = reached
  linked, (b, h, i) = refs[3], at
  coupling = linked.coupling[b, h, i] if shape.cfg.delta else None
  tokens = gpu_adjoint.through_end(
    shape, decay, coupling, k, linked.turned_k[b, h, i], d_last_k, d_kept, None
  )
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  tokens = tokens + gpu_adjoint.through_system(shape, decay, k, d_ld)
  d_sides = gpu_adjoint.alive_only(decay, d_ld) + d_lw
  return tokens + gpu_adjoint.through_errors(
    shape, decay, k, v, d_sides, list(d_rhs.items())
  )


def read_back(shape: Shape, stream, decay, at, E: Fast, d_k, d_v, d_logits):
  """Adds what the projections send to the memories they were read from."""
  dots, maps, gates = shape.dots, dict(E.maps), E.gates
  alive = gpu_adjoint.alive_only
  if 'v' in maps:
    value = alive(decay, tokens_of(shape, stream.value, at))
    maps['v'] = maps['v'] + dots.tn(d_v, value)
  key = alive(decay, tokens_of(shape, stream.key, at))
  if 'k' in maps:
    maps['k'] = maps['k'] + dots.tn(d_k, key)
  if gates is not None:
    columns = gpu_tile.columns(of_memories(shape, d_logits))
    gates = gates + dots.tn(key, columns)
  return Fast(maps, gates, None)


def of_memories(shape: Shape, d_logits):
  """Gradients of the gates' logits, zero for gates that are no memories."""
  return [
    d if gate in shape.cfg.gates else jnp.zeros_like(d)
    for gate, d in zip(GATES, d_logits)
  ]
