"""The walk back with momentum on a GPU: what keys, values and gates read.

Two kernels take the gradients E and F of the fast parts and momenta that
`gpu_momentum_walk` carries over one chunk, see `gpu_steps`. Those enter a chunk
by the same matrices for all memories, so the tokens see them only in sums over
the memories, `[K, K]`, such as `N = sum D^T E`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import (
  gpu_adjoint,
  gpu_momentum,
  gpu_momentum_adjoint,
  gpu_steps,
  gpu_turn,
  gpu_walk,
)
from nestax.models.memory.gpu_layout import (
  Fast,
  Shape,
  array,
  call,
  put,
  put_rows,
  scalars_of,
)
from nestax.models.memory.gpu_momentum_walk import Both
from nestax.models.memory.gpu_tile import COLUMNS

WARPS = 8


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
  rows = make(2, C, dtype='float32'), make(1, C, dtype='float32')
  turned = Turned(E, E, make(C, K), make(C, K), *rows)
  args = slow, stream, walked._replace(T=None), linked, parts
  if shape.free:
    (turned,) = call(
      _free_kernel, shape, (B, H, shape.n), args, (turned,),
      'memory_momentum_turn', WARPS, 1,
    )  # fmt: skip
    return turned, d_end

  def reached(stop, d: Both):
    """The boundary is the fast parts as they were after `filled` chunks."""
    if d_boundary is None:
      return d
    due = (stream.filled == stop)[:, :, None, None]

    def add(x, change):
      return x + jnp.where(due, change, 0.0)

    return Both(jax.tree.map(add, d.D, d_boundary), d.S)

  def before(step, state):
    d, sums = state
    return reached(shape.n - step, d), sums

  docs = stream.document is not None
  tile = jnp.zeros((B, H, K, K), shape.dtype)
  scalar = jnp.zeros((B, H), jnp.float32)
  sums = Sums(*[tile] * 4, tile if docs else None, *[scalar] * 3)
  kernels = (
    gpu_steps.Kernel(_over_kernel, 'memory_momentum_over', WARPS),
    gpu_steps.Kernel(_turn_kernel, 'memory_momentum_turn', WARPS),
  )
  turned, (d, _) = gpu_steps.walk(
    kernels, shape, (B, H), args, (d_end, sums), turned, before
  )
  return turned, reached(0, d)


class Sums(NamedTuple):
  """Over the memories, `[B, H, K, K]`, for the tokens of one chunk.

  Where no document begins, tokens read slow values and fast parts alike, and
  E and F are sums with both; else with slow values, and Q that with the rest.
  """

  N: jax.Array  # D^T E
  N_S: jax.Array  # S^T E
  E: jax.Array  # W^T E
  F: jax.Array  # W^T F
  Q: jax.Array | None  # D^T F
  kept: jax.Array  # sums of products of entries: D E, S E and S F, [B, H]
  c: jax.Array
  b: jax.Array


def _over_kernel(shape: Shape, step, slow, stream, walked, linked, parts,
                 state, turned, new):  # fmt: skip
  """Sums over the memories; gradients before the chunk by those after."""
  b, h = pl.program_id(0), pl.program_id(1)
  at = b, h, shape.n - 1 - step[0]
  d_refs, _ = state
  new_d, sums = new
  d = jax.tree.map(lambda ref: ref[b, h, :, :], d_refs)
  narrow = jax.tree.map(lambda x: x.astype(shape.dtype), d)
  jax.tree.map(lambda ref, x: put(ref, at, x), Both(turned.E, turned.F), narrow)
  _put_sums(shape, (slow, walked, sums), at, d, narrow)
  chunk = gpu_momentum.here(shape, stream, walked, at)
  d = _over(shape, linked, chunk, at, d, narrow)
  jax.tree.map(lambda ref, x: gpu_walk.write(ref, (b, h), x), new_d, d)


def _put_sums(shape: Shape, refs, at, d: Both, narrow: Both):
  dots, (slow, walked, sums), (b, h, i) = shape.dots, refs, at
  D, S = walked.start
  memories, of_b = [], 0.0
  for box in shape.carried:
    values = [x.maps[box][b, h, i] for x in (D, S)]
    gradients = [x.maps[box] for x in narrow]
    W = slow.folded[box][h, :, :]
    memories.append((*values, W, *gradients, dots.tn))
    of_b = of_b + jnp.sum(d.S.maps[box] * values[1].astype(jnp.float32))
  if narrow.D.gates is not None:
    values = [x.gates[b, h, i] for x in (D, S)]
    gradients = [x.gates for x in narrow]
    # a memory a column
    memories.append((*values, slow.gates[h, :, :], *gradients, dots.nt))
    of_b = of_b + jnp.sum(d.S.gates * values[1].astype(jnp.float32))

  def over(*pairs):
    total = 0.0
    for *x, product in memories:
      for left, right in pairs:
        total = total + product(x[left], x[right])
    return total

  D, S, W, E, F = range(5)
  N, N_S = over((D, E)), over((S, E))
  sums.kept[b, h], sums.c[b, h], sums.b[b, h] = _trace(N), _trace(N_S), of_b
  docs = sums.Q is not None
  tiles = N, N_S, *(
    over((W, x)) if docs else over((D, x), (W, x)) for x in (E, F)
  )  # fmt: skip
  tiles = (*tiles, over((D, F))) if docs else tiles
  for ref, x in zip(sums[:5], tiles):
    gpu_walk.write(ref, (b, h), x.astype(ref.dtype))


def _free_kernel(shape: Shape, slow, stream, walked, linked, parts, turned):
  at = tuple(pl.program_id(axis) for axis in range(3))
  refs = slow, stream, walked, linked, parts, turned
  chunk = gpu_momentum.here(shape, stream, walked, at)
  _finish(shape, refs, chunk, at, gpu_adjoint.none(shape), 0.0)


def _turn_kernel(shape: Shape, step, slow, stream, walked, linked, parts,
                 state, turned, new):  # fmt: skip
  """The tokens of a chunk; adds what they send to what they were read from."""
  b, h = pl.program_id(0), pl.program_id(1)
  at = b, h, shape.n - 1 - step[0]
  refs = slow, stream, walked, linked, parts, turned
  chunk = gpu_momentum.here(shape, stream, walked, at)
  tokens, total_b = _tokens(shape, refs, chunk, at, state[1])
  gradients = _finish(shape, refs, chunk, at, tokens, total_b)
  E = jax.tree.map(lambda ref: ref[b, h, :, :], state[0].D)
  E = gpu_turn.read_back(shape, stream, chunk.decay, at, E, *gradients)
  jax.tree.map(lambda ref, x: gpu_walk.write(ref, (b, h), x), new[0].D, E)


def _finish(shape: Shape, refs, chunk, at, tokens, total_b):
  """Writes gradients of keys, values and logits, and returns them."""
  *_, walked, _, parts, turned = refs
  b, h, i = at
  gate, k_norm, v_norm = scalars_of(shape, walked.scalars, at)
  d_k, d_v = (x[b, h, i].astype(jnp.float32) for x in (parts.k, parts.v))
  *rows, more_b = (parts.scalars[b, h, i, j, :] for j in range(4))
  tokens = tokens + gpu_adjoint.Tokens(d_k, d_v, *rows)
  put_rows(turned.d_total_b, at, (total_b + more_b,))
  return gpu_turn.finish(
    shape, turned, at, tokens, gate, chunk.k, chunk.v, k_norm, v_norm
  )


def _over(shape: Shape, linked, chunk, at, d: Both, narrow: Both) -> Both:
  """Gradients before the chunk by those after."""
  dots, (b, h, i) = shape.dots, at
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


def _trace(x):
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1)
  )
  return jnp.sum(jnp.where(row == column, x, 0.0))


def _tokens(shape: Shape, refs, chunk, at, sums: Sums):
  """(Tokens, gradient of total_b) by the memories carried here."""
  dots, (_, _, walked, linked, *_) = shape.dots, refs
  (b, h, i), decay = at, chunk.decay
  side, ku = gpu_momentum.sides_of(shape, chunk), walked.ku[b, h, i]
  N, N_S, E, F, Q = (
    None if ref is None else ref[b, h, :, :] for ref in sums[:5]
  )

  def along_lw(of_fast, of_slow):
    if decay.alive is None:
      return dots.nn(side.lw, of_slow)
    return dots.nn(side.lw, of_slow) + dots.nn(side.alive_lw, of_fast)

  def of_lw():
    d_lw = dots.nt(ku, E) + dots.nt(side.kb, F)
    if decay.alive is None:
      return d_lw
    return d_lw + gpu_adjoint.alive_only(
      decay, dots.nt(ku, N) + dots.nt(side.kb, Q)
    )

  system = (None,) * 4
  if shape.cfg.delta:
    turned_k = walked.turned_k[b, h, i]
    X_D, X_S, X_W = (x[b, h, i] for x in linked.X)
    system = (
      lambda: dots.nt(turned_k, N),
      lambda: dots.nt(turned_k, N_S),
      lambda: dots.nn(X_D, N) + dots.nn(X_S, N_S) - dots.nn(X_W, E),
      lambda last_k, last_Ak: (
        dots.nt(turned_k, last_k), -dots.nt(turned_k, last_Ak)
      ),
    )  # fmt: skip
  reached = gpu_momentum_adjoint.Reached(
    lambda: along_lw(N, E), lambda: along_lw(Q, F), *system,
    sums.kept[b, h], sums.c[b, h], sums.b[b, h],
  )  # fmt: skip
  tokens, total_b = gpu_momentum_adjoint.through_chunk(
    shape, chunk, walked.A_p[b, h, i], reached
  )
  k, v = chunk.k.astype(jnp.float32), chunk.v.astype(jnp.float32)
  errors = gpu_adjoint.through_errors(shape, decay, k, v, of_lw(), [])
  return tokens + errors, total_b
