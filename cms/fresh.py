"""A batch of fresh sequences, in one piece or chunk by chunk (NL Eq. 71)."""

import functools

import jax
import jax.numpy as jnp

from nestax.cms import level as levels_
from nestax.cms import update
from nestax.cms.level import Writes
from nestax.cms.stream import Net, Piece, StreamConfig, gradients, written
from nestax.cms.walk import Carry, walk


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
  surprise_B = jnp.zeros((piece.tokens_BxL.shape[0],), jnp.float32)
  start = Carry(mixers, tuple(levels), surprise_B)
  if _at_once(cfg, net):
    still = jax.lax.stop_gradient((rates, start, piece))
    found = _writes(cfg, net.constant or net, *still)
    end, writes = jax.lax.stop_gradient(found)
    scales = [_scale(cfg, rate_n) for rate_n in rates]
    return net.whole(tuple(map(Writes, scales, writes)), piece), *end[1:]
  full = cfg.differentiate == 'full'
  chunk = functools.partial(_chunk, cfg, net)
  if full or remat:
    chunk = jax.checkpoint(chunk, prevent_cse=False)
  end, y, _ = walk(cfg, rates, chunk, lambda s: None, start, piece, full)
  return y, *end[1:]


def _at_once(cfg: StreamConfig, net: Net) -> bool:
  # of 'dgd' an origin's steps are in proportion to another rate than a level's
  mixed = cfg.nested and cfg.update.optimizer == 'dgd'
  first_order = cfg.differentiate == 'first_order'
  return first_order and net.whole is not None and not mixed


def _writes(cfg: StreamConfig, net: Net, rates, start: Carry, piece: Piece):
  """(the end, what each level had written in each period, `[n, m, B, ...]`)."""
  dtype = piece.x_BxLxD.dtype

  def chunk(carry, piece):
    return _chunk(cfg, net, carry, piece)[0], ()

  def note(state):
    return jax.tree.map(lambda x: x.astype(dtype), state.delta)

  end, _, noted = walk(cfg, rates, chunk, note, start, piece)
  return end, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), noted)


def _scale(cfg: StreamConfig, rate_n):
  """1, and its derivative that of a step by the level's rate, of its size."""
  rate_n = update.effective(cfg.update, rate_n)
  size_n = jax.lax.stop_gradient(rate_n)
  tiny = jnp.finfo(jnp.float32).tiny
  return 1.0 + (rate_n - size_n) / jnp.maximum(size_n, tiny)


def _chunk(cfg: StreamConfig, net: Net, carry: Carry, piece: Piece):
  """Reads a chunk, or what is left of one, and adds to all levels' totals."""
  mixers, levels, surprise_B = carry
  B, length = piece.tokens_BxL.shape
  alive_BxL = None
  if piece.reset_BxL is not None:
    levels = tuple(levels_.forget(s, piece.reset_BxL[:, 0]) for s in levels)
    inside = piece.reset_BxL.at[:, 0].set(False)
    alive_BxL = jnp.cumsum(inside, axis=1) == 0
  weights, where = written(levels), (None, alive_BxL)
  if length < cfg.periods[0]:
    mixers, y, _ = net.forward(weights, mixers, piece, *where)
    return Carry(mixers, levels, surprise_B), y
  mixers, y, grads, sum_B, count_B = gradients(
    net, cfg.differentiate == 'first_order', weights, mixers, piece, *where
  )
  learn_B = jnp.ones((B,), bool) if alive_BxL is None else alive_BxL[:, -1]
  levels = tuple(
    levels_.accumulate(s, g, count_B, learn_B) for s, g in zip(levels, grads)
  )
  if alive_BxL is not None:
    levels = tuple(levels_.forget(s, ~learn_B) for s in levels)
  mean_B = jax.lax.stop_gradient(sum_B / jnp.maximum(count_B, 1.0))
  return Carry(mixers, levels, jnp.where(learn_B, mean_B, surprise_B)), y
