"""Streams that go on: each sequence cut at its own boundaries."""

import jax
import jax.numpy as jnp

from nestax.cms import level as levels_
from nestax.cms.level import where_rows
from nestax.cms.once import once
from nestax.cms.stream import (
  Net,
  Piece,
  StreamConfig,
  StreamState,
  check,
  commit,
  gradients,
  still,
  written,
)


def run(
  cfg: StreamConfig,
  net: Net,
  rates,
  state: StreamState,
  mixers,
  piece: Piece,
):
  """Reads any number of tokens of sequences whose clocks may differ.

  Args:
    cfg: how the levels learn.
    net: the network.
    rates: inner learning rates of each level, `[n]` arrays.
    state: of the levels.
    mixers: state of the mixers.
    piece: the tokens, at least one.

  Returns:
    (state, mixers, `y` of every token).
  """
  check(cfg, state.levels, rates)
  C = cfg.periods[0]
  if (held := state.held.tokens_BxL.shape[1]) != C:
    raise ValueError(
      f'a state with room for {held} pending tokens, and a smallest period of '
      f'{C}: as many are wanted'
    )
  L = piece.tokens_BxL.shape[1]
  phase_B = state.clock_B % C
  if L == 1:
    carry, y = _part(cfg, net, rates, (state, mixers), piece, None)
    return *carry, y
  if net.constant:
    ready = net.constant()  # once for all chunks
    net = net._replace(constant=lambda: ready)
  n, width = -(-(L + C - 1) // C), min(C, L)
  padded = jax.tree.map(
    lambda x: jnp.pad(x, ((0, 0), (0, width)) + ((0, 0),) * (x.ndim - 2)),
    piece,
  )

  def body(carry, index):
    start_B = jnp.clip(index * C - phase_B, 0, L)
    stop_B = jnp.clip((index + 1) * C - phase_B, 0, L)
    cut = jax.vmap(
      lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, width)
    )
    part = jax.tree.map(lambda x: cut(x, start_B), padded)
    return _part(cfg, net, rates, carry, part, stop_B - start_B)

  carry, ys = jax.lax.scan(body, (state, mixers), jnp.arange(n))
  place_BxL = _places(phase_B, L, C, width)

  def gather(y):
    y = jnp.moveaxis(y, 0, 1)
    y = y.reshape(y.shape[0], n * width, *y.shape[3:])
    return jax.vmap(lambda row, place: row[place])(y, place_BxL)

  return *carry, jax.tree.map(gather, ys)


def _places(phase_B, L: int, C: int, width: int):
  """Where each token of the call stands among the parts, `[B, L]`."""
  grid_BxL = phase_B[:, None] + jnp.arange(L)[None]
  index_BxL = grid_BxL // C
  first_BxL = jnp.maximum(index_BxL * C, phase_B[:, None])
  return index_BxL * width + grid_BxL - first_BxL


def _part(cfg, net, rates, carry, piece: Piece, length_B):
  """Reads tokens that cross no sequence's boundary; commits at their end."""
  state, mixers = carry
  B, width = piece.tokens_BxL.shape
  count_B = jnp.full((B,), width) if length_B is None else length_B
  C = cfg.periods[0]
  alive_BxL = None
  levels, skip_B = state.levels, state.skip_B
  if piece.reset_BxL is not None:
    reset_BxL = piece.reset_BxL & (jnp.arange(width)[None] < count_B[:, None])
    first_B = reset_BxL[:, 0] & (state.clock_B % C == 0)
    inside = reset_BxL.at[:, 0].set(reset_BxL[:, 0] & ~first_B)
    levels = tuple(levels_.forget(s, first_B) for s in levels)
    alive_BxL = jnp.cumsum(inside, axis=1) == 0
  mixers, y, _ = net.forward(
    written(levels), mixers, piece, length_B, alive_BxL
  )
  if alive_BxL is not None:
    broken_B = ~alive_BxL[:, -1]
    levels = tuple(levels_.forget(s, broken_B) for s in levels)
    skip_B = skip_B | broken_B
  state = state._replace(
    levels=levels,
    skip_B=skip_B,
    clock_B=state.clock_B + count_B.astype(jnp.int32),
    held=_hold(state.held, state.held_B, piece, count_B),
    held_B=state.held_B + count_B.astype(jnp.int32),
  )
  due_B = (state.clock_B % C == 0) & (count_B > 0)

  def learn(state):
    return _learn(cfg, net, rates, state, mixers, due_B, due_B)

  if width > 1:
    state = jax.lax.cond(due_B.any(), learn, lambda state: state, state)
    return (state, mixers), y
  # all that reads the levels comes first, so that they are written in place
  state, mixers, y = jax.lax.optimization_barrier((state, mixers, y))
  return (once(due_B.any(), learn, state), mixers), y


def _hold(held: Piece, held_B, piece: Piece, count_B) -> Piece:
  """Appends each sequence's tokens to the pending ones."""
  B, width = piece.tokens_BxL.shape
  C = held.tokens_BxL.shape[1]
  if piece.reset_BxL is None:
    piece = piece._replace(reset_BxL=jnp.zeros((B, width), bool))
  index_1xW = jnp.arange(width)[None]
  # tokens that do not count are sent past the end, where they are dropped
  slot_BxW = jnp.where(
    index_1xW < count_B[:, None], held_B[:, None] + index_1xW, C
  )

  def put(old, new):
    write = jax.vmap(lambda o, s, n: o.at[s].set(n, mode='drop'))
    return write(old, slot_BxW, new.astype(old.dtype))

  return jax.tree.map(put, held, piece)


def _learn(cfg, net, rates, state: StreamState, mixers, ends_B, flush_B):
  """Learns from what is pending and commits; `ends_B`: a chunk ends here.

  With `flush_B` equal to `ends_B` levels commit on schedule; where it is True
  and `ends_B` is not, every level does.
  """
  learn_B = flush_B & ~state.skip_B & (state.held_B > 1)
  # the replay starts before the chunk, so that its gradient is that of a
  # chunk read in one call
  _, _, grads, sum_B, count_B = gradients(
    net,
    still(net) if cfg.differentiate == 'first_order' else None,
    written(state.levels),
    state.boundary,
    state.held,
    state.held_B,
    None,
  )
  levels = tuple(
    levels_.accumulate(s, g, count_B, learn_B)
    for s, g in zip(state.levels, grads)
  )
  for k, period in enumerate(cfg.periods):
    due_B = ends_B & (state.clock_B % period == 0)
    levels = commit(cfg, levels, rates, k, due_B | (flush_B & ~ends_B))
  mean_B = sum_B / jnp.maximum(count_B, 1.0)
  return state._replace(
    levels=levels,
    skip_B=state.skip_B & ~ends_B,
    held_B=jnp.where(flush_B, 0, state.held_B),
    boundary=where_rows(flush_B, mixers, state.boundary),
    surprise_B=jnp.where(learn_B, mean_B, state.surprise_B),
  )


def flush(
  cfg: StreamConfig, net: Net, rates, state: StreamState, mixers
) -> StreamState:
  """Learns from the pending tokens now and commits every level.

  The clock stays, so the next commits come at the same tokens as without.
  """
  none_B = jnp.zeros_like(state.skip_B)
  return _learn(cfg, net, rates, state, mixers, none_B, ~none_B)


def forget(cfg: StreamConfig, state: StreamState) -> StreamState:
  """Empties the levels of every sequence, as a document's start does.

  In the middle of a chunk, the rest of it is not learned from.
  """
  inside_B = state.clock_B % cfg.periods[0] != 0
  every_B = jnp.ones_like(inside_B)
  return state._replace(
    levels=tuple(levels_.forget(s, every_B) for s in state.levels),
    skip_B=state.skip_B | inside_B,
  )
