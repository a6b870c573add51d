"""The schedule of fresh sequences as nested scans (NL Eq. 71)."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nestax.cms.level import LevelState
from nestax.cms.stream import Piece, StreamConfig, commit

REMATS = ('chunks', 'groups')


class Carry(NamedTuple):
  """What goes from chunk to chunk."""

  mixers: Any
  levels: tuple[LevelState, ...]
  own: tuple[Any, ...]  # made of each level's writes when it has committed
  surprise_B: jax.Array  # mean objective of the last chunk learned from
  at: jax.Array  # int32, tokens read
  found: tuple[Any, ...]  # of each level's period, `[B, period, ...]`, or None
  notes: tuple[Any, ...]  # of each level, stacked by its periods, or None


class Hooks(NamedTuple):
  """What is done on a walk.

  Attributes:
    chunk: `(carry, piece) -> (carry, y, found)`, reads at most a smallest
      period; leaves of `y` and of each level's `found` are `[B, length, ...]`.
    own: `(k, delta) -> ` level k's part of `Carry.own`.
    note: `(k, own, delta) -> ` what to remember of level k before each period.
    room: `(k, delta) -> ` zeros for all that is found in a period of level k.
    gather: `(k, level, found, piece) -> ` level k with its total, from what
      was found in the piece that was its period; None where every chunk adds
      to totals.
  """

  chunk: Callable
  own: Callable = lambda k, delta: None
  note: Callable = lambda k, own, delta: None
  room: Callable = lambda k, delta: None
  gather: Callable | None = None


def walk(
  cfg: StreamConfig,
  rates,
  hooks: Hooks,
  mixers,
  levels,
  piece: Piece,
  remat: str = '',
):
  """Reads a piece chunk by chunk; every level commits at its own period.

  Args:
    cfg: how the levels learn.
    rates: inner learning rates of each level, `[n]` arrays.
    hooks: what is done on the way.
    mixers: fresh state of the mixers.
    levels: fresh LevelStates.
    piece: the whole stream, the grid of all periods starting with it.
    remat: what the backward pass recomputes: '' nothing, all that chunks have
      computed is kept; 'chunks' each chunk and each commit, so that the state
      at every chunk's start is kept, and what is found in it; 'groups' the
      scans by groups of about a square root of the chunks as well, so that
      only as many states are kept.

  Returns:
    (the last carry, `y` of every token).
  """
  L = piece.tokens_BxL.shape[1]
  grouped = remat == 'groups'
  group = _remat_level(cfg.periods, L) if grouped else None

  def part(k, carry, piece):
    """Reads a piece in which levels up to k commit."""
    if k < 0:
      carry, y, found = hooks.chunk(carry, piece)
      return _put(cfg, carry, found, piece), y
    P, length = cfg.periods[k], piece.tokens_BxL.shape[1]
    n, ys = length // P, []
    if n:
      whole = jax.tree.map(lambda x: x[:, : n * P], piece)
      carry, y = loop(k, n, carry, whole)
      ys.append(y)
    if length > n * P:
      rest = jax.tree.map(lambda x: x[:, n * P :], piece)
      carry, y = part(k - 1, gathering(_noted(cfg, hooks, k, carry), k), rest)
      ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.concatenate(y, 1), *ys)

  def loop(k, n, carry, piece):
    # what the slower levels have written is a constant of this scan
    fixed = _slower(carry, k)

    def body(carry, piece):
      carry = _noted(cfg, hooks, k, _whole(carry, k, fixed))
      if k:  # the total of the fastest is one chunk's gradient
        carry = gathering(carry, k)
      carry, y = part(k - 1, carry, piece)
      end = functools.partial(_committed, cfg, rates, hooks, k)
      return _moving(again(k > 0, end)(carry, piece), k), y

    body = again(k == 0 or k == group, body)
    xs = jax.tree.map(lambda x: _cut(x, n), piece)
    carry = _moving(carry, k)
    carry, ys = _scan(body, carry, xs, n, grouped and group is None)
    return _whole(carry, k, fixed), jax.tree.map(_join, ys)

  def again(chosen, part):
    """Makes the backward pass recompute a part."""
    if not remat or not chosen:
      return part
    return jax.checkpoint(part, prevent_cse=False)

  def gathering(carry, k):
    return carry if hooks.gather else _gathering(carry, k)

  carry = _start(cfg, hooks, mixers, levels, piece)
  carry, y = part(len(cfg.periods) - 1, carry, piece)
  for k in range(len(cfg.periods)):
    carry = _gathering(carry, k)
  return carry, y


def _start(cfg: StreamConfig, hooks: Hooks, mixers, levels, piece) -> Carry:
  """What goes into the first chunk of a piece."""
  B, L = piece.tokens_BxL.shape

  def each(make):
    return tuple(make(k, s.delta) for k, s in enumerate(levels))

  def notes(k, delta):
    shapes = jax.eval_shape(lambda d: hooks.note(k, hooks.own(k, d), d), delta)
    m = -(-L // cfg.periods[k])
    return jax.tree.map(lambda x: jnp.zeros((m, *x.shape), x.dtype), shapes)

  def room(k, delta):
    return hooks.room(k, delta) if cfg.periods[k] <= L else None

  return Carry(
    mixers,
    tuple(s._replace(total=None) for s in levels),
    each(hooks.own),
    jnp.zeros((B,), jnp.float32),
    jnp.int32(0),
    each(room),
    each(notes),
  )


def _put(cfg: StreamConfig, carry: Carry, found, piece: Piece) -> Carry:
  """Lays what a chunk has found where it stands in each level's period."""

  def put(period, room, new):
    if room is None:
      return None
    if period == piece.tokens_BxL.shape[1]:
      return new
    place = carry.at % period
    return jax.tree.map(
      lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, place, 1),
      room,
      new,
    )

  if found is not None:
    found = tuple(map(put, cfg.periods, carry.found, found))
    carry = carry._replace(found=found)
  return carry._replace(at=carry.at + piece.tokens_BxL.shape[1])


def _noted(cfg: StreamConfig, hooks: Hooks, k: int, carry: Carry) -> Carry:
  """Remembers level k as it is before a period of its own."""
  note = hooks.note(k, carry.own[k], carry.levels[k].delta)
  place = carry.at // cfg.periods[k]
  note = jax.tree.map(
    lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, place, 0),
    carry.notes[k],
    note,
  )
  return carry._replace(notes=_with(carry.notes, k, note))


def _committed(
  cfg: StreamConfig, rates, hooks: Hooks, k, carry, piece
) -> Carry:
  """Level k commits a piece, and the next faster one may start again."""
  if hooks.gather:
    level = hooks.gather(k, carry.levels[k], carry.found[k], piece)
    carry = carry._replace(levels=_with(carry.levels, k, level))
  levels, own = commit(cfg, carry.levels, rates, k), list(carry.own)
  own[k] = hooks.own(k, levels[k].delta)
  if k and cfg.nested:
    own[k - 1] = hooks.own(k - 1, levels[k - 1].delta)
  return carry._replace(levels=levels, own=tuple(own))


def _with(items, k: int, new) -> tuple:
  return (*items[:k], new, *items[k + 1 :])


def _gathering(carry: Carry, k: int) -> Carry:
  """Level k with a total that can be added to in a scan."""
  levels = list(carry.levels)
  if levels[k].total is None:
    zeros = jax.tree.map(jnp.zeros_like, levels[k].delta)
    levels[k] = levels[k]._replace(total=zeros)
  return carry._replace(levels=tuple(levels))


def _slower(carry: Carry, k: int):
  slow = zip(carry.levels, carry.own, carry.notes)
  return [(s.delta, s.moment, *rest) for s, *rest in slow][k + 1 :]


def _moving(carry: Carry, k: int) -> Carry:
  """What a scan of level k's periods carries: all but slower levels' writes."""
  slow = [s._replace(delta=None, moment=None) for s in carry.levels[k + 1 :]]
  return carry._replace(
    levels=(*carry.levels[: k + 1], *slow),
    own=(*carry.own[: k + 1], *[None] * len(slow)),
    notes=(*carry.notes[: k + 1], *[None] * len(slow)),
  )


def _whole(moving: Carry, k: int, fixed) -> Carry:
  """Undoes `_moving`; `fixed` is what `_slower` gave."""
  slow = zip(moving.levels[k + 1 :], fixed)
  slow = [s._replace(delta=d, moment=m) for s, (d, m, *_) in slow]
  return moving._replace(
    levels=(*moving.levels[: k + 1], *slow),
    own=(*moving.own[: k + 1], *(own for *_, own, _ in fixed)),
    notes=(*moving.notes[: k + 1], *(notes for *_, notes in fixed)),
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
