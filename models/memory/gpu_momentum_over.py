"""The walk back with momentum on a GPU, of one memory: `gpu_momentum_turn`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import (
  gpu_adjoint,
  gpu_momentum,
  gpu_steps,
  gpu_tile,
  gpu_turn,
  gpu_walk,
)
from nestax.models.memory.gpu_layout import (
  Fast,
  Shape,
  marks_of,
  put,
  put_rows,
  scalars_of,
  tokens_of,
)
from nestax.models.memory.gpu_momentum_adjoint import Piece
from nestax.models.memory.gpu_momentum_walk import Both


class Turned(NamedTuple):
  """What the walk back found, `[B, H, n, ...]`."""

  E: Fast  # of the fast parts after the chunk, [K, K]; `mem` None
  F: Fast  # of the momenta
  d_key: jax.Array  # of keys before their norm, [C, K]
  d_value: jax.Array
  d_logits: jax.Array  # [2, C], float32
  d_total_b: jax.Array  # [1, C], float32


class Sums(NamedTuple):
  """A memory's part of the sums, `[B, H, K, K]`, for the tokens of a chunk.

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


class Carried(NamedTuple):
  """What goes from kernel to kernel."""

  d: Both
  sums: dict[str, Sums]  # of 'k', 'v' and 'gates', where they are memories
  pieces: Piece  # of the chunk after, [B, H, pieces, ...]


def over_kernel(shape: Shape, step, slow, stream, walked, linked, parts,
                 state, turned, new):  # fmt: skip
  """Of a memory: finishes the chunk after, then goes over the chunk."""
  b, h = pl.program_id(0), pl.program_id(1)
  i = shape.n - 1 - step[0]
  # the last chunk has none after it: it gets nothing, which is written over
  after = b, h, jnp.minimum(i + 1, shape.n - 1)

  def over(box, d):
    if d is None:
      return
    at = b, h, i
    _put_narrow(turned, at, box, d)
    _put_sums(shape, slow, walked, new.sums[box], at, box, d)
    chunk = gpu_momentum.here(shape, stream, walked, at)
    d = _over(shape, linked, chunk, at, box, d)
    _put_both(new.d, (b, h), box, d)

  _finish(shape, (stream, walked, state, turned), after, over)


def last_kernel(shape: Shape, step, slow, stream, walked, linked, parts,
                 state, turned, new):  # fmt: skip
  """Finishes the first chunk."""
  b, h = pl.program_id(0), pl.program_id(1)

  def keep(box, d):
    if d is not None:
      _put_both(new.d, (b, h), box, d)

  _finish(shape, (stream, walked, state, turned), (b, h, 0), keep)


def _of(fast: Fast, box):
  return fast.gates if box == 'gates' else fast.maps.get(box)


def _put_both(refs: Both, place, box, d) -> None:
  for ref, x in zip(refs, d):
    gpu_walk.write(_of(ref, box), place, x)


def _put_narrow(turned: Turned, at, box, d) -> None:
  for ref, x in zip((turned.E, turned.F), d):
    put(_of(ref, box), at, x)


def _finish(shape: Shape, refs, at, then) -> None:
  """Finishes a chunk, a program a memory; `then(box, (E, F) or None)`."""
  stream, walked, state, turned = refs
  place, dots = at[:2], shape.dots
  alive = _alive(marks_of(stream, at))

  def pair(box, d_x, tokens):
    """Gradients of a memory with what was read of it, `d_x^T x`."""
    E, F = (_of(ref, box) for ref in state.d)
    if E is None:
      return None
    E, F = E[(*place, slice(None), slice(None))], F[place]
    x = tokens_of(shape, tokens, at)
    x = x if alive is None else alive[:, None] * x
    product = dots.tn(x, d_x) if box == 'gates' else dots.tn(d_x, x)
    return E + product, F

  found = shape, walked, state.pieces, place, turned, at

  def key():
    then('k', pair('k', finish_key(*found), stream.key))

  def value():
    then('v', pair('v', finish_value(*found), stream.value))

  def gates():
    logits = gpu_turn.of_memories(shape, finish_logits(*found))
    then('gates', pair('gates', gpu_tile.columns(logits), stream.key))

  gpu_steps.each_program(key, value, gates)


def _alive(marks):
  if marks.document is None:
    return None
  return (marks.document == 0).astype(jnp.float32)


def _pieces(refs: Piece, place):
  """The sum over pieces of what reaches keys, float32."""
  total = 0.0
  for j in range(refs.k.shape[-3]):
    total = total + refs.k[(*place, j)].astype(jnp.float32)
  return total


def finish_key(shape: Shape, walked, pieces: Piece, place, turned, at):
  """Writes the gradient of keys before their norm, and returns it."""
  _, k_norm, _ = scalars_of(shape, walked.scalars, at)
  k = walked.k[at].astype(jnp.float32)
  d_k = gpu_tile.unit_back(_pieces(pieces, place), k, k_norm)
  d_k = d_k.astype(shape.dtype)
  put(turned.d_key, at, d_k)
  return d_k


def finish_value(shape: Shape, walked, pieces: Piece, place, turned, at):
  """The same of values."""
  *_, v_norm = scalars_of(shape, walked.scalars, at)
  v = walked.v[at].astype(jnp.float32)
  d_v = gpu_tile.unit_back(pieces.v[place].astype(jnp.float32), v, v_norm)
  d_v = d_v.astype(shape.dtype)
  put(turned.d_value, at, d_v)
  return d_v


def finish_logits(shape: Shape, walked, pieces: Piece, place, turned, at):
  """The same of both gates' logits, and of the momentum's gate."""
  gate, *_ = scalars_of(shape, walked.scalars, at)
  total, enters, eta, total_b = (
    sum(pieces.rows[(*place, j, row, slice(None))]
        for j in range(pieces.rows.shape[-3]))
    for row in range(pieces.rows.shape[-2])
  )  # fmt: skip
  put_rows(turned.d_total_b, at, (total_b,))
  d_logits = gpu_adjoint.logits_back(
    gate, gpu_adjoint.Tokens(None, None, total, enters, eta)
  )
  put_rows(turned.d_logits, at, d_logits)
  return d_logits


def _put_sums(shape: Shape, slow, walked, sums: Sums, at, box, d) -> None:
  """A memory's part of the sums."""
  dots, (b, h, i) = shape.dots, at
  D, S = (_of(x, box)[b, h, i] for x in walked.start)
  E, F = (x.astype(shape.dtype) for x in d)
  gates = box == 'gates'
  W = slow.gates[h, :, :] if gates else slow.maps[box][h, :, :]
  # of gates, a memory is a column
  product = dots.nt if gates else dots.tn
  N, N_S = product(D, E), product(S, E)
  sums.kept[b, h], sums.c[b, h] = _trace(N), _trace(N_S)
  sums.b[b, h] = jnp.sum(d[1] * S.astype(jnp.float32))
  of_E, of_F, Q = product(W, E), product(W, F), product(D, F)
  if not gates:
    # of the map's identity, see `gpu_tile.at_point`
    of_E, of_F = of_E + E.astype(jnp.float32), of_F + F.astype(jnp.float32)
  if sums.Q is None:
    tiles = N, N_S, of_E + N, of_F + Q
  else:
    tiles = N, N_S, of_E, of_F, Q
  for ref, x in zip(sums[:5], tiles):
    gpu_walk.write(ref, (b, h), x.astype(ref.dtype))


def _trace(x):
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1)
  )
  return jnp.sum(jnp.where(row == column, x, 0.0))


def _over(shape: Shape, linked, chunk, at, box, d):
  """Gradients before the chunk by those after."""
  dots, (E, F) = shape.dots, d
  gates = box == 'gates'

  def back(x, A_ref):
    A, x = A_ref[at], x.astype(shape.dtype)
    return dots.nn(A, x) if gates else dots.nt(x, A)

  new_E = chunk.decay.kept * E + back(E, linked.A_DD) + back(F, linked.A_DS)
  new_F = chunk.push.b_end * F + chunk.push.c_end * E
  if linked.A_SD is not None:
    new_F = new_F + back(E, linked.A_SD)
  return new_E, new_F
