"""A batch of fresh sequences: the schedule as nested scans (NL Eq. 71)."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nestax.cms import level as levels_
from nestax.cms.level import LevelState
from nestax.cms.stream import (
  Net,
  Piece,
  StreamConfig,
  commit,
  gradients,
  written,
)


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

  Args:
    cfg: how the levels learn.
    net: the network.
    rates: inner learning rates of each level, `[n]` arrays.
    levels: fresh LevelStates.
    mixers: fresh state of the mixers.
    piece: the whole stream.
    remat: recompute chunks in the backward pass; 'full' always does.

  Returns:
    (`y` of every token, the levels at the end, the mean objective of the last
    chunk that each sequence learned from, `[B]`).
  """
  full = cfg.differentiate == 'full'
  B, L = piece.tokens_BxL.shape
  group = _remat_level(cfg.periods, L) if full else None
  every_B = jnp.ones((B,), bool)
  chunk = functools.partial(_chunk, cfg, net)
  if full or remat:
    chunk = jax.checkpoint(chunk, prevent_cse=False)

  def walk(k, carry, piece):
    """Reads a piece in which levels up to k commit."""
    if k < 0:
      return chunk(carry, piece)
    P, length = cfg.periods[k], piece.tokens_BxL.shape[1]
    n = length // P
    ys = []
    if n:
      whole = jax.tree.map(lambda x: x[:, : n * P], piece)
      carry, y = loop(k, n, carry, whole)
      ys.append(y)
    if length > n * P:
      rest = jax.tree.map(lambda x: x[:, n * P :], piece)
      carry, y = walk(k - 1, carry, rest)
      ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.concatenate(y, 1), *ys)

  def loop(k, n, carry, piece):
    # what the slower levels have written is a constant of this scan
    fixed = [(s.delta, s.moment) for s in carry.levels[k + 1 :]]

    def body(carry, piece):
      carry = carry._replace(levels=_whole(carry.levels, k, fixed))
      carry, y = walk(k - 1, carry, piece)
      levels = commit(cfg, carry.levels, rates, k, every_B)
      return carry._replace(levels=_moving(levels, k)), y

    if k == group:
      body = jax.checkpoint(body, prevent_cse=False)
    xs = jax.tree.map(lambda x: _cut(x, n), piece)
    carry = carry._replace(levels=_moving(carry.levels, k))
    carry, ys = _scan(body, carry, xs, n, full and group is None)
    ys = jax.tree.map(lambda y: _join(y), ys)
    return carry._replace(levels=_whole(carry.levels, k, fixed)), ys

  start = Carry(mixers, tuple(levels), jnp.zeros((B,), jnp.float32))
  end, y = walk(len(cfg.periods) - 1, start, piece)
  return y, end.levels, end.surprise_B


class Carry(NamedTuple):
  """What goes from chunk to chunk."""

  mixers: Any
  levels: tuple[LevelState, ...]
  surprise_B: jax.Array  # mean objective of the last chunk learned from


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


def _moving(levels, k: int):
  """What a scan of level k's periods carries: all but slower levels' writes."""
  slow = [s._replace(delta=None, moment=None) for s in levels[k + 1 :]]
  return (*levels[: k + 1], *slow)


def _whole(moving, k: int, fixed):
  """Undoes `_moving`: `fixed` are the slower levels' deltas and momenta."""
  slow = zip(moving[k + 1 :], fixed)
  slow = [s._replace(delta=d, moment=m) for s, (d, m) in slow]
  return (*moving[: k + 1], *slow)


def _remat_level(periods, L: int):
  """The level whose periods are recomputed as one in the backward pass.

  With the chunks inside it recomputed one by one, the states kept are those
  of its periods and of the chunks of one period: fewest where there are about
  as many of either. None if no period is near that; `_scan` then makes
  groups.
  """
  chunks = L // periods[0]
  root = math.sqrt(max(chunks, 1))
  ratios = [p // periods[0] for p in periods]
  near = [
    (abs(math.log(r / root)), k)
    for k, r in enumerate(ratios)
    if k and root / 2.5 <= r <= root * 2.5
  ]
  return min(near)[1] if near else None


def _scan(body, carry, xs, n: int, remat: bool):
  """`lax.scan`, in the backward pass by groups of about sqrt(n) if `remat`."""
  size = _divisor(n)
  if not remat or size == 1:
    return jax.lax.scan(body, carry, xs, length=n)
  xs = jax.tree.map(lambda x: x.reshape(n // size, size, *x.shape[1:]), xs)

  @jax.checkpoint
  def group(carry, xs):
    return jax.lax.scan(body, carry, xs, length=size)

  carry, ys = jax.lax.scan(group, carry, xs, length=n // size)
  return carry, jax.tree.map(lambda y: y.reshape(n, *y.shape[2:]), ys)


def _divisor(n: int) -> int:
  """The divisor of n nearest to its square root from below."""
  return max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)


def _cut(x, n: int):
  """`[B, n * P, ...]` to `[n, B, P, ...]`."""
  B, L = x.shape[:2]
  return jnp.moveaxis(x.reshape(B, n, L // n, *x.shape[2:]), 1, 0)


def _join(y):
  """`[n, B, P, ...]` to `[B, n * P, ...]`."""
  n, B, P = y.shape[:3]
  return jnp.moveaxis(y, 0, 1).reshape(B, n * P, *y.shape[3:])
