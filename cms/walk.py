"""The schedule of fresh sequences as nested scans (NL Eq. 71)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nestax.cms.level import LevelState
from nestax.cms.stream import Piece, StreamConfig, commit


class Carry(NamedTuple):
  """What goes from chunk to chunk."""

  mixers: Any
  levels: tuple[LevelState, ...]
  surprise_B: jax.Array  # mean objective of the last chunk learned from


def walk(
  cfg: StreamConfig,
  rates,
  chunk: Callable,
  note: Callable,
  start: Carry,
  piece: Piece,
  remat: bool = False,
):
  """Reads a piece chunk by chunk; every level commits at its own period.

  Args:
    cfg: how the levels learn.
    rates: inner learning rates of each level, `[n]` arrays.
    chunk: `(carry, piece) -> (carry, y)`, reads at most a smallest period;
      leaves of `y` are `[B, length, ...]`.
    note: `LevelState -> ` what to remember of a level at the start of each of
      its periods.
    start: the first carry.
    piece: the whole stream, the grid of all periods starting with it.
    remat: the backward pass recomputes the scans by groups.

  Returns:
    (the last carry, `y` of every token, the notes of each level stacked by
    its periods).
  """
  K = len(cfg.periods)
  every_B = jnp.ones((piece.tokens_BxL.shape[0],), bool)
  L = piece.tokens_BxL.shape[1]
  group = _remat_level(cfg.periods, L) if remat else None

  def part(k, carry, piece):
    """Reads a piece in which levels up to k commit."""
    if k < 0:
      carry, y = chunk(carry, piece)
      return carry, (y, (None,) * K)
    P, length = cfg.periods[k], piece.tokens_BxL.shape[1]
    n = length // P
    found = []
    if n:
      whole = jax.tree.map(lambda x: x[:, : n * P], piece)
      carry, one = loop(k, n, carry, whole)
      found.append(one)
    if length > n * P:
      rest = jax.tree.map(lambda x: x[:, n * P :], piece)
      noted = jax.tree.map(lambda x: x[None], note(carry.levels[k]))
      carry, (y, notes) = part(k - 1, carry, rest)
      found.append((y, _with(notes, k, noted)))
    ys, notes = zip(*found)
    join = lambda axis: lambda *x: jnp.concatenate(x, axis)  # noqa: E731
    return carry, (jax.tree.map(join(1), *ys), jax.tree.map(join(0), *notes))

  def loop(k, n, carry, piece):
    # what the slower levels have written is a constant of this scan
    fixed = [(s.delta, s.moment) for s in carry.levels[k + 1 :]]

    def body(carry, piece):
      carry = carry._replace(levels=_whole(carry.levels, k, fixed))
      noted = note(carry.levels[k])
      carry, (y, notes) = part(k - 1, carry, piece)
      levels = commit(cfg, carry.levels, rates, k, every_B)
      carry = carry._replace(levels=_moving(levels, k))
      return carry, (y, _with(notes, k, noted))

    if k == group:
      body = jax.checkpoint(body, prevent_cse=False)
    xs = jax.tree.map(lambda x: _cut(x, n), piece)
    carry = carry._replace(levels=_moving(carry.levels, k))
    carry, (ys, notes) = _scan(body, carry, xs, n, remat and group is None)
    faster = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), notes[:k])
    found = jax.tree.map(_join, ys), (*faster, *notes[k:])
    return carry._replace(levels=_whole(carry.levels, k, fixed)), found

  end, (y, notes) = part(K - 1, start, piece)
  return end, y, notes


def _with(notes, k: int, noted):
  return (*notes[:k], noted, *notes[k + 1 :])


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
