"""The walk back with momentum on a GPU: what keys, values and gates read.

One program is one head of one sequence; it carries the gradients E and F of
the fast parts and momenta that `gpu_momentum_walk` carries. Those enter a
chunk by the same matrices for all memories, so the tokens see them only in
sums over the memories, `[K, K]`, such as `N = sum D^T E`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import (
  gpu_adjoint,
  gpu_momentum,
  gpu_momentum_adjoint,
  gpu_tile,
  gpu_turn,
  gpu_walk,
)
from nestax.models.memory.gpu_layout import (
  Fast,
  Shape,
  anchored,
  anchors,
  array,
  call,
  put,
  put_rows,
  scalars_of,
)
from nestax.models.memory.gpu_momentum_walk import Both
from nestax.models.memory.gpu_tile import COLUMNS

WARPS = 4
STAGES = 1


class Turned(NamedTuple):
  """What the walk back found, `[B, H, n, ...]`."""

  E: Fast  # of the fast parts after the chunk, [K, K]; `mem` None
  F: Fast  # of the momenta
  d_key: jax.Array  # of keys before their norm, [C, K]
  d_value: jax.Array
  d_logits: jax.Array  # [2, C], float32
  d_total_b: jax.Array  # [1, C], float32


def turn(shape: Shape, slow, stream, walked, linked, parts, d_end: Both,
         d_boundary):  # fmt: skip
  """(Turned, gradients of the first chunk's fast parts and momenta).

  Args:
    shape: of the walk.
    slow: slow values.
    stream: inputs.
    walked: of the walk.
    linked: of the chunks.
    parts: of the tokens by `mem`.
    d_end: of fast parts and momenta at the end, `mem` None.
    d_boundary: of the fast parts after `stream.filled` chunks, or None.
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
  rows = make(2, C, dtype='float32'), make(1, C, dtype='float32')
  return call(
    _turn_kernel, shape, (B, H, shape.n if shape.free else 1),
    (slow, stream, walked._replace(T=None), linked, parts, d_end, d_boundary,
     anchors(shape)),
    (Turned(E, E, make(C, K), make(C, K), *rows), like),
    'memory_momentum_turn', WARPS, STAGES,
  )  # fmt: skip


def _turn_kernel(shape: Shape, slow, stream, walked, linked, parts, d_end,
                 d_boundary, zeros, turned, d_start):  # fmt: skip
  b, h = pl.program_id(0), pl.program_id(1)
  refs = slow, stream, walked, linked, parts, turned
  if shape.free:
    nothing = Both(*[Fast({}, None, None)] * 2)
    _chunk(shape, refs, (b, h, pl.program_id(2)), nothing, {})
    return

  def reached(stop, d: Both):
    """The boundary is the fast parts as they were after `filled` chunks."""
    if d_boundary is None:
      return d

    def add(E):
      return jax.tree.map(lambda x, ref: x + ref[b, h, :, :], E, d_boundary)

    due = stream.filled[b, 0] == stop
    return Both(jax.lax.cond(due, add, lambda E: E, d.D), d.S)

  # read once: they stay in shared memory
  folded = {box: slow.folded[box][h, :, :] for box in shape.carried}

  def chunk(back, d):
    i = shape.n - 1 - back
    at = anchored(zeros, b, h, i)
    return _chunk(shape, refs, at, reached(i + 1, d), folded)

  d = jax.tree.map(lambda ref: ref[b, h, :, :], d_end)
  d = reached(0, jax.lax.fori_loop(0, shape.n, chunk, d))
  jax.tree.map(lambda ref, x: gpu_walk.write(ref, (b, h), x), d_start, d)


def _chunk(shape: Shape, refs, at, d: Both, folded) -> Both:
  """From the gradients after chunk `at` to those before it."""
  slow, stream, walked, linked, parts, turned = refs
  b, h, i = at
  chunk = gpu_momentum.here(shape, stream, walked, at)
  gate, k_norm, v_norm = scalars_of(shape, walked.scalars, at)
  narrow = jax.tree.map(lambda x: x.astype(shape.dtype), d)
  jax.tree.map(lambda ref, x: put(ref, at, x), Both(turned.E, turned.F), narrow)
  tokens = gpu_adjoint.none(shape)
  total_b = jnp.zeros((shape.C,), jnp.float32)
  if not shape.free:
    tokens, total_b = _tokens(shape, refs, chunk, at, d, narrow, folded)
    d = _over(shape, refs, chunk, at, d, narrow)
  d_k, d_v = (x[b, h, i].astype(jnp.float32) for x in (parts.k, parts.v))
  *rows, more_b = (parts.scalars[b, h, i, j, :] for j in range(4))
  tokens = tokens + gpu_adjoint.Tokens(d_k, d_v, *rows)
  put_rows(turned.d_total_b, at, (total_b + more_b,))
  d_logits = gpu_adjoint.logits_back(gate, tokens)
  put_rows(turned.d_logits, at, d_logits)
  k, v = chunk.k.astype(jnp.float32), chunk.v.astype(jnp.float32)
  d_k = gpu_tile.settled(shape.dots, tokens.k)
  d_k = gpu_tile.unit_back(d_k, k, k_norm).astype(shape.dtype)
  put(turned.d_key, at, d_k)
  d_v = gpu_tile.settled(shape.dots, tokens.v)
  if v_norm is not None:
    d_v = gpu_tile.unit_back(d_v, v, v_norm)
  d_v = d_v.astype(shape.dtype)
  put(turned.d_value, at, d_v)
  E = gpu_turn.read_back(
    shape, stream, chunk.decay, at, d.D, d_k, d_v, d_logits
  )
  return Both(E, d.S)


def _over(shape: Shape, refs, chunk, at, d: Both, narrow: Both) -> Both:
  """Gradients before the chunk by those after."""
  dots, linked, (b, h, i) = shape.dots, refs[3], at
  A_DD, A_DS = linked.A_DD[b, h, i], linked.A_DS[b, h, i]
  A_SD = None if linked.A_SD is None else linked.A_SD[b, h, i]
  kept, c_end, b_end = chunk.decay.kept, chunk.push.c_end, chunk.push.b_end

  def back(E, F, narrow_E, narrow_F, dot):
    new_E = kept * E + dot(narrow_E, A_DD) + dot(narrow_F, A_DS)
    new_F = b_end * F + c_end * E
    if A_SD is not None:
      new_F = new_F + dot(narrow_E, A_SD)
    return new_E, new_F

  maps, momenta = {}, {}
  for box in shape.carried:
    pairs = (x.maps[box] for x in (*d, *narrow))
    maps[box], momenta[box] = back(*pairs, dots.nt)
  gates = gates_S = None
  if d.D.gates is not None:
    columns = (x.gates for x in (*d, *narrow))
    gates, gates_S = back(*columns, lambda x, A: dots.nn(A, x))
  return Both(Fast(maps, gates, None), Fast(momenta, gates_S, None))


def _pairs(shape: Shape, refs, at, narrow: Both, folded):
  """Of every memory (D, S, W, E, F) and the product `x^T y` of two of them."""
  dots, (slow, _, walked, *_), (b, h, i) = shape.dots, refs, at
  D, S = walked.start
  for box in shape.carried:
    values = (x.maps[box][b, h, i] for x in (D, S))
    gradients = (x.maps[box] for x in narrow)
    yield (*values, folded[box], *gradients), dots.tn
  if narrow.D.gates is not None:
    values = D.gates[b, h, i], S.gates[b, h, i], slow.gates[h, :, :]
    # a memory a column
    yield (*values, narrow.D.gates, narrow.S.gates), dots.nt


def _over_memories(pairs, *which):
  """Sum over memories of products, such as 'D^T E' for `(0, 3)`."""
  total = 0.0
  for values, product in pairs:
    for x, y in which:
      total = total + product(values[x], values[y])
  return total


def _trace(x):
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1)
  )
  return jnp.sum(jnp.where(row == column, x, 0.0))


def _tokens(shape: Shape, refs, chunk, at, d, narrow, folded):
  """(Tokens, gradient of total_b) by the memories carried here."""
  cfg, dots, (_, _, walked, linked, *_) = shape.cfg, shape.dots, refs
  (b, h, i), decay, dtype = at, chunk.decay, shape.dtype
  pairs = list(_pairs(shape, refs, at, narrow, folded))
  D, S, W, E, F = range(5)
  side, ku = gpu_momentum.sides_of(shape, chunk), walked.ku[b, h, i]
  N = _over_memories(pairs, (D, E))
  kept, N = _trace(N), N.astype(dtype)
  N_S = _over_memories(pairs, (S, E))
  c, N_S = _trace(N_S), N_S.astype(dtype)
  of_b = sum(
    jnp.sum(values[S].astype(jnp.float32) * x)
    for (values, _), x in zip(pairs, jax.tree.leaves(d.S))
  )
  if decay.alive is None:
    E_sum = _over_memories(pairs, (D, E), (W, E)).astype(dtype)
    F_sum = _over_memories(pairs, (D, F), (W, F)).astype(dtype)
    d_lw = dots.nt(ku, E_sum) + dots.nt(side.kb, F_sum)

    def along_lw(N, N_W):
      return dots.nn(side.lw, N_W)
  else:
    E_sum, F_sum = (_over_memories(pairs, (W, x)).astype(dtype) for x in (E, F))
    Q = _over_memories(pairs, (D, F)).astype(dtype)
    d_lw = dots.nt(ku, N) + dots.nt(side.kb, Q)
    d_lw = gpu_adjoint.alive_only(decay, d_lw)
    d_lw = d_lw + dots.nt(ku, E_sum) + dots.nt(side.kb, F_sum)

    def along_lw(N, N_W):
      return dots.nn(side.lw, N_W) + dots.nn(side.alive_lw, N)

  k, v = chunk.k.astype(jnp.float32), chunk.v.astype(jnp.float32)
  errors = gpu_adjoint.through_errors(shape, decay, k, v, d_lw, [])
  system = (None,) * 4
  if cfg.delta:
    turned_k = walked.turned_k[b, h, i]
    X_D, X_S, X_W = (x[b, h, i] for x in linked.X)

    def of_last_k():
      return dots.nn(X_D, N) + dots.nn(X_S, N_S) - dots.nn(X_W, E_sum)

    system = (
      lambda: dots.nt(turned_k, N),
      lambda: dots.nt(turned_k, N_S),
      of_last_k,
      lambda last_k, last_Ak: (
        dots.nt(turned_k, last_k), -dots.nt(turned_k, last_Ak)
      ),
    )  # fmt: skip
  Q = None if decay.alive is None else Q
  reached = gpu_momentum_adjoint.Reached(
    lambda: along_lw(N, E_sum), lambda: along_lw(Q, F_sum), *system,
    kept, c, of_b,
  )  # fmt: skip
  tokens, total_b = gpu_momentum_adjoint.through_chunk(
    shape, chunk, walked.A_p[b, h, i], reached
  )
  return tokens + errors, total_b
