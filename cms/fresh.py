"""A batch of fresh sequences, in one piece or chunk by chunk (NL Eq. 71)."""

import functools

import jax
import jax.numpy as jnp

from nestax.cms import factors, update
from nestax.cms import level as levels_
from nestax.cms.level import Writes
from nestax.cms.stream import (
  Net,
  Piece,
  StreamConfig,
  check,
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
  remat: str = 'chunks',
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
    remat: what the backward pass recomputes of what is read by chunks, see
      `walk.walk`. `net.whole` sees to itself.

  Returns:
    (`y` of every token, the levels at the end, the mean objective of the last
    chunk that each sequence learned from, `[B]`).
  """
  check(cfg, levels, rates)
  if _at_once(cfg, net):
    return _twice(cfg, net, rates, levels, mixers, piece)
  constant = None if cfg.differentiate == 'full' else still(net)
  hooks = _hooks(cfg, net, constant, piece)
  end, y = walk(cfg, rates, hooks, mixers, levels, piece, remat)
  return y, end.levels, end.surprise_B


def _hooks(cfg: StreamConfig, net: Net, constant, piece: Piece) -> Hooks:
  """How chunks are read: by factors where the network can."""
  if constant is not None or not net.tapped:
    return Hooks(functools.partial(_chunk, cfg, net, constant))

  def room(k, delta):
    shapes = jax.eval_shape(
      lambda d: _by_token(_tap(cfg.periods[k], net.own(k, d), None, None)),
      delta,
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  slow = [None] * len(cfg.periods)
  if piece.reset_BxL is not None:  # what is read after a document's start
    slow = [net.own(k, None) for k in range(len(cfg.periods))]
  return Hooks(
    functools.partial(_tapped, cfg, net, slow),
    room=room,
    gather=functools.partial(_gathered, cfg),
    own=net.own,
  )


def _at_once(cfg: StreamConfig, net: Net) -> bool:
  # of 'dgd' an origin's steps are in proportion to another rate than a level's
  mixed = cfg.nested and cfg.update.optimizer == 'dgd'
  first_order = cfg.differentiate == 'first_order'
  return first_order and net.whole is not None and not mixed


def _twice(cfg: StreamConfig, net: Net, rates, levels, mixers, piece: Piece):
  """`run` of what can be read at once."""
  inputs = jax.lax.stop_gradient((rates, levels, mixers, piece))
  # a network that has no constant form is a constant from here on
  end = jax.lax.stop_gradient(_write(cfg, still(net), *inputs))
  scales = [_scale(cfg, rate_n) for rate_n in rates]
  y = net.whole(tuple(map(_writes, scales, end.notes)), piece)
  return y, end.levels, end.surprise_B


def _write(cfg: StreamConfig, net: Net, rates, levels, mixers, piece: Piece):
  """The end, whose notes are what levels are read with in each period."""
  hooks = _hooks(cfg, net, None, piece)

  def chunk(carry, piece):
    carry, _, found = read(carry, piece)
    return carry, None, found

  def note(k, own, delta):
    return net.own(k, delta) if own is None else own

  read, hooks = hooks.chunk, hooks._replace(chunk=chunk, note=note)
  return walk(cfg, rates, hooks, mixers, levels, piece)[0]


def _writes(scale_n, note):
  """The Writes of a level, or a list of each block's."""
  if isinstance(note, list):
    return [Writes(scale_n[i], own) for i, own in enumerate(note)]
  return Writes(scale_n, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), note))


def _scale(cfg: StreamConfig, rate_n):
  """1, and its derivative that of a step by the level's rate, of its size."""
  rate_n = update.effective(cfg.update, rate_n)
  size_n = jax.lax.stop_gradient(rate_n)
  tiny = jnp.finfo(jnp.float32).tiny
  return 1.0 + (rate_n - size_n) / jnp.maximum(size_n, tiny)


def _chunk(cfg: StreamConfig, net: Net, constant, carry: Carry, piece: Piece):
  """Reads a chunk, or what is left of one, and adds to all levels' totals."""
  carry, alive_BxL, learn_B = _begun(carry, piece)
  given = written(carry.levels), carry.mixers, piece, None, alive_BxL
  if piece.tokens_BxL.shape[1] < cfg.periods[0]:
    mixers, y, _ = net.forward(*given)
    return carry._replace(mixers=mixers), y, None
  mixers, y, grads, *sums = gradients(net, constant, *given)
  carry = carry._replace(
    mixers=mixers,
    levels=tuple(
      levels_.accumulate(s, g, sums[1], learn_B)
      for s, g in zip(carry.levels, grads)
    ),
  )
  return _ended(carry, *sums, learn_B), y, None


def _tapped(cfg: StreamConfig, net: Net, slow, carry: Carry, piece: Piece):
  """`_chunk` by the factors of gradients, which totals are to be made of.

  `slow` are weights of all, of each level; None where no document starts.
  """
  carry, alive_BxL, learn_B = _begun(carry, piece)
  length = piece.tokens_BxL.shape[1]
  # what a level has written is in its weights whether or not a document has
  # started since: its tokens pass them by
  masks = [
    None if alive_BxL is None else alive_BxL & (s.kept_B[:, None] > 0)
    for s in carry.levels
  ]
  weights = tuple(map(functools.partial(_tap, length), carry.own, slow, masks))
  if length < cfg.periods[0]:  # nothing is learned, and taps have no use
    given = written(carry.levels), carry.mixers, piece, None, alive_BxL
    mixers, y, _ = net.forward(*given)
    return carry._replace(mixers=mixers), y, tuple(map(_by_token, weights))
  given = weights, carry.mixers, piece, None, None
  mixers, y, grads, *sums = gradients(net, None, *given)
  carry = carry._replace(
    mixers=mixers,
    levels=tuple(levels_.count(s, sums[1], learn_B) for s in carry.levels),
  )
  return _ended(carry, *sums, learn_B), y, tuple(map(_by_token, grads))


def _tap(L: int, own, slow, alive_BxL):
  """A level's weights of all its blocks, to be read by L tokens."""
  if isinstance(own, list):
    slow = slow or [None] * len(own)
    return [factors.tap(o, L, s, alive_BxL) for o, s in zip(own, slow)]
  return factors.tap(own, L, slow, alive_BxL)


def _by_token(tapped):
  """The factors, or the zeros in place of them, with `[B, L]` in front."""
  if isinstance(tapped, list):
    return [one.taps for one in tapped]
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), tapped.taps)


def _gathered(cfg: StreamConfig, k: int, level, found, piece: Piece):
  """Level k with the gradient of the period that `piece` is."""
  kept_BxP = None
  if piece.reset_BxL is not None:
    kept_BxP = factors.kept(piece.reset_BxL, cfg.periods[0])
  if isinstance(found, list):
    blocks = [factors.added_up(f, kept_BxP) for f in found]
    grads = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
  else:
    found = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), found)
    grads = factors.added_up(found, kept_BxP)
  return levels_.accumulate(level, grads, jnp.zeros_like(level.count_B))


def _begun(carry: Carry, piece: Piece):
  """(carry, tokens before any document that starts inside, who learns)."""
  if piece.reset_BxL is None:
    return carry, None, None
  first_B = piece.reset_BxL[:, 0]
  levels = tuple(levels_.forget(s, first_B) for s in carry.levels)
  inside = piece.reset_BxL.at[:, 0].set(False)
  alive_BxL = jnp.cumsum(inside, axis=1) == 0
  return carry._replace(levels=levels), alive_BxL, alive_BxL[:, -1]


def _ended(carry: Carry, sum_B, count_B, learn_B) -> Carry:
  """The carry after a whole chunk, whose objective was `sum_B`."""
  surprise_B = jax.lax.stop_gradient(sum_B / jnp.maximum(count_B, 1.0))
  if learn_B is None:
    return carry._replace(surprise_B=surprise_B)
  return carry._replace(
    levels=tuple(levels_.forget(s, ~learn_B) for s in carry.levels),
    surprise_B=jnp.where(learn_B, surprise_B, carry.surprise_B),
  )
