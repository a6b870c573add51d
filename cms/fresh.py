"""A batch of fresh sequences, in one piece or chunk by chunk (NL Eq. 71)."""

import functools

import jax
import jax.numpy as jnp

from nestax.cms import level as levels_
from nestax.cms import update
from nestax.cms.level import Own, Theta, Writes
from nestax.cms.stream import (
  Net,
  Piece,
  StreamConfig,
  gradients,
  still,
  written,
)
from nestax.cms.walk import Carry, Hooks, walk


def run(
  cfg: StreamConfig,
  net: Net,
  rates,
  levels,
  mixers,
  piece: Piece,
  remat: bool = False,
):
  """Reads fresh sequences of any one length.

  Where writes are constants of the outer gradient, `first_order`, and the
  network can be read at once, it is read twice: chunk by chunk for what the
  levels write, which nothing is differentiated through, and then as a whole,
  each period with its own weights. All else is read by chunks once.

  Args:
    cfg: how the levels learn.
    net: the network.
    rates: inner learning rates of each level, `[n]` arrays.
    levels: fresh LevelStates.
    mixers: fresh state of the mixers.
    piece: the whole stream.
    remat: what is read by chunks is recomputed in the backward pass; 'full'
      always is. `net.whole` sees to itself.

  Returns:
    (`y` of every token, the levels at the end, the mean objective of the last
    chunk that each sequence learned from, `[B]`).
  """
  if _at_once(cfg, net):
    return _twice(cfg, net, rates, levels, mixers, piece)
  full = cfg.differentiate == 'full'
  chunk = functools.partial(_chunk, cfg, net, None if full else still(net))
  if full or remat:
    chunk = jax.checkpoint(chunk, prevent_cse=False)
  hooks = Hooks(chunk, lambda k, delta: None, lambda delta: None)
  end, y, _ = walk(cfg, rates, hooks, mixers, levels, piece, full)
  return y, end.levels, end.surprise_B


def _at_once(cfg: StreamConfig, net: Net) -> bool:
  # of 'dgd' an origin's steps are in proportion to another rate than a level's
  mixed = cfg.nested and cfg.update.optimizer == 'dgd'
  first_order = cfg.differentiate == 'first_order'
  return first_order and net.whole is not None and not mixed


def _twice(cfg: StreamConfig, net: Net, rates, levels, mixers, piece: Piece):
  """`run` of what can be read at once."""
  inputs = jax.lax.stop_gradient((rates, levels, mixers, piece))
  found = _write(cfg, still(net), *inputs)
  # a network that has no constant form is a constant from here on
  end, deltas = jax.lax.stop_gradient(found)
  scales = [_scale(cfg, rate_n) for rate_n in rates]
  y = net.whole(tuple(map(Writes, scales, deltas)), piece)
  return y, end.levels, end.surprise_B


def _write(cfg: StreamConfig, net: Net, rates, levels, mixers, piece: Piece):
  """(the end, what each level had written after each period but the last)."""
  L, dtype = piece.tokens_BxL.shape[1], piece.x_BxLxD.dtype
  # a document's start leaves a sequence without what is added up here
  own = net.own if piece.reset_BxL is None else None
  hooks = Hooks(
    chunk=lambda carry, piece: (_chunk(cfg, net, None, carry, piece)[0], ()),
    own=own or (lambda k, delta: None),
    note=lambda delta: jax.tree.map(lambda d: d.astype(dtype), delta),
  )
  end, _, notes = walk(cfg, rates, hooks, mixers, levels, piece)

  def kept(period, note):
    return jax.tree.map(
      lambda x: jnp.moveaxis(x[: (L - 1) // period], 0, 1), note
    )

  return end, tuple(map(kept, cfg.periods, notes))


def _scale(cfg: StreamConfig, rate_n):
  """1, and its derivative that of a step by the level's rate, of its size."""
  rate_n = update.effective(cfg.update, rate_n)
  size_n = jax.lax.stop_gradient(rate_n)
  tiny = jnp.finfo(jnp.float32).tiny
  return 1.0 + (rate_n - size_n) / jnp.maximum(size_n, tiny)


def _chunk(cfg: StreamConfig, net: Net, constant, carry: Carry, piece: Piece):
  """Reads a chunk, or what is left of one, and adds to all levels' totals."""
  levels, length = carry.levels, piece.tokens_BxL.shape[1]
  alive_BxL = learn_B = None
  if piece.reset_BxL is not None:
    levels = tuple(levels_.forget(s, piece.reset_BxL[:, 0]) for s in levels)
    inside = piece.reset_BxL.at[:, 0].set(False)
    alive_BxL = jnp.cumsum(inside, axis=1) == 0
    learn_B = alive_BxL[:, -1]
  weights = carry.own if carry.own[0] is not None else written(levels)
  given = weights, carry.mixers, piece, None, alive_BxL
  if length < cfg.periods[0]:
    mixers, y, _ = net.forward(*given)
    return carry._replace(mixers=mixers, levels=levels), y
  mixers, y, grads, sum_B, count_B = gradients(net, constant, *given)
  grads = [_theta(g) for g in grads]
  levels = tuple(
    levels_.accumulate(s, g, count_B, learn_B) for s, g in zip(levels, grads)
  )
  surprise_B = jax.lax.stop_gradient(sum_B / jnp.maximum(count_B, 1.0))
  if learn_B is not None:
    levels = tuple(levels_.forget(s, ~learn_B) for s in levels)
    surprise_B = jnp.where(learn_B, surprise_B, carry.surprise_B)
  carry = carry._replace(mixers=mixers, levels=levels, surprise_B=surprise_B)
  return carry, y


def _theta(grads) -> Theta:
  """The gradient of a level's weights, `[n, ...]`, however they are read."""
  if isinstance(grads, list):
    grads = jax.tree.map(lambda *x: jnp.stack(x), *grads)
  return grads.theta if isinstance(grads, Own) else grads
