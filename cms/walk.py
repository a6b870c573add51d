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
  own: tuple[Any, ...]  # made of each level's writes when it has committed
  surprise_B: jax.Array  # mean objective of the last chunk learned from


class Hooks(NamedTuple):
  """What is done on a walk.

  Attributes:
    chunk: `(carry, piece) -> (carry, y)`, reads at most a smallest period;
      leaves of `y` are `[B, length, ...]`.
    own: `(k, delta) -> ` level k's part of `Carry.own`.
    note: `(k, carry) -> ` what to remember of level k before each period.
    gather: `(k, level, y, piece) -> ` level k with its total, from the `y` of
      the piece that was its period; None where every chunk adds to totals.
    rest: `(k, y) -> y` without what level k alone is to gather from.
  """

  chunk: Callable
  own: Callable = lambda k, delta: None
  note: Callable = lambda k, carry: None
  gather: Callable | None = None
  rest: Callable = lambda k, y: y


def walk(
  cfg: StreamConfig,
  rates,
  hooks: Hooks,
  mixers,
  levels,
  piece: Piece,
  remat: bool = False,
):
  """Reads a piece chunk by chunk; every level commits at its own period.

  Args:
    cfg: how the levels learn.
    rates: inner learning rates of each level, `[n]` arrays.
    hooks: what is done on the way.
    mixers: fresh state of the mixers.
    levels: fresh LevelStates.
    piece: the whole stream, the grid of all periods starting with it.
    remat: the backward pass recomputes the scans by groups.

  Returns:
    (the last carry, `y` of every token, the notes of each level stacked by
    its periods, the last of which may be a part of one).
  """
  B, L = piece.tokens_BxL.shape
  K = len(cfg.periods)
  group = _remat_level(cfg.periods, L) if remat else None

  def part(k, carry, piece):
    """Reads a piece in which levels up to k commit."""
    if k < 0:
      carry, y = hooks.chunk(carry, piece)
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
      note = jax.tree.map(lambda x: x[None], hooks.note(k, carry))
      carry, (y, notes) = part(k - 1, gathering(carry, k), rest)
      found.append((hooks.rest(k, y), _with(notes, k, note)))
    ys, notes = zip(*found)
    y = jax.tree.map(lambda *y: jnp.concatenate(y, 1), *ys)
    return carry, (y, tuple(map(_stacked, *notes)))

  def loop(k, n, carry, piece):
    # what the slower levels have written is a constant of this scan
    fixed = _slower(carry, k)

    def body(carry, piece):
      carry = _whole(carry, k, fixed)
      note = hooks.note(k, carry)
      if k:  # the total of the fastest is one chunk's gradient
        carry = gathering(carry, k)
      carry, (y, notes) = part(k - 1, carry, piece)
      if hooks.gather:
        level = hooks.gather(k, carry.levels[k], y, piece)
        carry = carry._replace(levels=_with(carry.levels, k, level))
      carry = _committed(cfg, rates, hooks, k, carry)
      return _moving(carry, k), (hooks.rest(k, y), _with(notes, k, note))

    if k == group:
      body = jax.checkpoint(body, prevent_cse=False)
    xs = jax.tree.map(lambda x: _cut(x, n), piece)
    carry = _moving(carry, k)
    carry, (ys, notes) = _scan(body, carry, xs, n, remat and group is None)
    faster = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), notes[:k])
    found = jax.tree.map(_join, ys), (*faster, *notes[k:])
    return _whole(carry, k, fixed), found

  def gathering(carry, k):
    return carry if hooks.gather else _gathering(carry, k)

  carry = Carry(
    mixers,
    tuple(s._replace(total=None) for s in levels),
    tuple(hooks.own(k, s.delta) for k, s in enumerate(levels)),
    jnp.zeros((B,), jnp.float32),
  )
  carry, (y, notes) = part(K - 1, carry, piece)
  for k in range(K):
    carry = _gathering(carry, k)
  return carry, y, notes


def _committed(cfg: StreamConfig, rates, hooks: Hooks, k, carry) -> Carry:
  """Level k commits, and the next faster one may start again."""
  levels, own = commit(cfg, carry.levels, rates, k), list(carry.own)
  own[k] = hooks.own(k, levels[k].delta)
  if k and cfg.nested:
    own[k - 1] = hooks.own(k - 1, levels[k - 1].delta)
  return carry._replace(levels=levels, own=tuple(own))


def _with(items, k: int, new) -> tuple:
  return (*items[:k], new, *items[k + 1 :])


def _stacked(*notes):
  notes = [note for note in notes if note is not None]
  if not notes:
    return None
  if len(notes) == 1:
    return notes[0]
  return jax.tree.map(lambda *x: jnp.concatenate(x, 0), *notes)


def _gathering(carry: Carry, k: int) -> Carry:
  """Level k with a total that can be added to in a scan."""
  levels = list(carry.levels)
  if levels[k].total is None:
    zeros = jax.tree.map(jnp.zeros_like, levels[k].delta)
    levels[k] = levels[k]._replace(total=zeros)
  return carry._replace(levels=tuple(levels))


def _slower(carry: Carry, k: int):
  slow = zip(carry.levels[k + 1 :], carry.own[k + 1 :])
  return [(s.delta, s.moment, own) for s, own in slow]


def _moving(carry: Carry, k: int) -> Carry:
  """What a scan of level k's periods carries: all but slower levels' writes."""
  slow = [s._replace(delta=None, moment=None) for s in carry.levels[k + 1 :]]
  return carry._replace(
    levels=(*carry.levels[: k + 1], *slow),
    own=(*carry.own[: k + 1], *[None] * len(slow)),
  )


def _whole(moving: Carry, k: int, fixed) -> Carry:
  """Undoes `_moving`; `fixed` is what `_slower` gave."""
  slow = zip(moving.levels[k + 1 :], fixed)
  slow = [s._replace(delta=d, moment=m) for s, (d, m, _) in slow]
  return moving._replace(
    levels=(*moving.levels[: k + 1], *slow),
    own=(*moving.own[: k + 1], *(own for *_, own in fixed)),
  )


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
