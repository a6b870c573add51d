"""The active phase: a token stream in chunks, every level on its schedule.

The smallest period is the chunk. Inside a chunk no weight changes; at its end
the gradient of its objective goes to the totals of all levels, and the levels
whose period the sequence's clock has reached commit, fastest first.

=============================  =============================================
situation                      what happens
=============================  =============================================
the clock reaches a multiple   the level commits, whatever the lengths of
of a level's period            the calls were
a call ends inside a chunk     its tokens stay pending in the state, with the
                               mixers' state at the chunk's start; the chunk
                               is learned from when it is full
a stream shorter than the      everything is pending: nothing is learned
smallest period                unless `flush` is called
a chunk ends, but not the      the slower level's total keeps the gradient,
period of a slower level       pending
`flush`                        the pending tokens are learned from, and every
                               level that has gathered something commits; the
                               clock and the grid stay, and what is left of
                               the chunk is learned from by itself
a document starts at the       levels, totals and momenta are empty from that
first token of a chunk         token on; the grid stays
a document starts inside a     the same; that chunk is not learned from, the
chunk                          next one is
a gradient is not finite       that commit writes nothing
fresh sequences, no state      the grid starts at 0; what is pending at the
                               end is dropped
=============================  =============================================

Two programs do this. `cms/fresh.py` is for training: the grid is known, so the
levels are nested scans and a slow level is a constant of the scan below it.
`cms/resume.py` is for streams: sequences may stand anywhere on their grids, so
each is cut at its own boundaries and commits under `lax.cond`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nestax.cms import level as levels_
from nestax.cms.level import LevelState
from nestax.cms.schedule import Level, Schedule
from nestax.cms.update import UpdateConfig

DIFFERENTIATE = ('full', 'first_order')


@dataclasses.dataclass(frozen=True)
class StreamConfig:
  """How the levels of a stream learn.

  Attributes:
    periods: tokens between commits, fastest first, each a multiple of the one
      before.
    update: the inner optimiser.
    differentiate: 'full' sends the outer gradient through what the levels
      wrote, 'first_order' takes the writes for constants.
    nested: a faster level goes back to a learned origin whenever the next
      slower one commits (NL Eq. 72).

  Raises:
    ValueError: for periods that are not each a multiple of the one before, a
      first one below 2, or another word for `differentiate`.
  """

  periods: tuple[int, ...]
  update: UpdateConfig
  differentiate: str = 'first_order'
  nested: bool = False

  def __post_init__(self):
    if self.differentiate not in DIFFERENTIATE:
      raise ValueError(
        f'differentiate={self.differentiate!r}: one of {DIFFERENTIATE}'
      )
    if not self.periods or min(self.periods) < 2:
      raise ValueError(
        f'periods={self.periods}: one at least, and each 2 tokens or more, '
        'since a level learns from pairs of them'
      )
    Schedule(tuple(Level(period, 1) for period in self.periods))


class Piece(NamedTuple):
  """Part of a stream, as the learning part of the network takes it."""

  x_BxLxD: jax.Array
  tokens_BxL: jax.Array
  reset_BxL: jax.Array | None


class Net(NamedTuple):
  """The network above the first level that learns.

  Attributes:
    forward: `(weights, mixers, piece, length_B, alive_BxL) -> (mixers, y,
      seen)`; `weights` are what is added to the slow ones, one `[n, B, ...]`
      tree a level; the first `length_B` tokens of a row count, the others
      must not reach `mixers`; `y` is what the caller wants of every token.
    loss: `(weights, y, seen, piece, length_B) -> (sum_B, count_B)`.
    through: whether `loss` is differentiated through `forward`.
    constant: makes the same network, its slow weights being constants for any
      derivative; None for a network that has none. Called where that is used,
      so that what it prepares of them is not prepared for nothing.
    whole: `(writes, piece) -> y`: reads fresh sequences at once, given the
      `level.Writes` of each level; None for a network that cannot.
    own: `(k, delta) -> ` what level k is read with, or a list of that of each
      block, for `Writes`; without a delta the slow weights, which have no axis
      of sequences; None as `whole`.
    tapped: whether `forward` takes a `factors.Tapped` of it in place of what
      the level has written.
  """

  forward: Callable
  loss: Callable
  through: bool
  constant: 'Callable[[], Net] | None' = None
  whole: Callable | None = None
  own: Callable | None = None
  tapped: bool = False


class StreamState(NamedTuple):
  """What the levels of every sequence carry from call to call."""

  levels: tuple[LevelState, ...]
  clock_B: jax.Array  # int32, tokens read
  skip_B: jax.Array  # bool, this chunk is not learned from
  held: Piece  # [B, C, ...] the pending tokens
  held_B: jax.Array  # int32, how many there are
  boundary: Any  # mixers' state before the first of them, leaves [n, B, ...]
  surprise_B: jax.Array  # mean objective of the last chunk learned from


def init_state(levels, mixers, C: int, B: int, D: int, dtype) -> StreamState:
  """Fresh sequences, from the fresh states of their levels and mixers."""
  held = Piece(
    jnp.zeros((B, C, D), dtype),
    jnp.zeros((B, C), jnp.int32),
    jnp.zeros((B, C), bool),
  )
  return StreamState(
    levels=tuple(levels),
    clock_B=jnp.zeros((B,), jnp.int32),
    skip_B=jnp.zeros((B,), bool),
    held=held,
    held_B=jnp.zeros((B,), jnp.int32),
    boundary=mixers,
    surprise_B=jnp.zeros((B,), jnp.float32),
  )


def check(cfg: StreamConfig, levels, rates) -> None:
  """Raises a ValueError if there is not one level and rate for each period."""
  if not len(levels) == len(rates) == len(cfg.periods):
    raise ValueError(
      f'{len(levels)} levels and {len(rates)} rates for the periods '
      f'{cfg.periods}: one of each for each'
    )
  for k, (level, rate) in enumerate(zip(levels, rates)):
    n = jax.tree.leaves(level.delta)[0].shape[0]
    if jnp.shape(rate) != (n,):
      raise ValueError(
        f'rates[{k}] of the shape {jnp.shape(rate)}: ({n},) is wanted, one '
        'number for each block that the level stands in'
      )


def still(net: Net) -> Net:
  """The network as it is differentiated for writes that are constants."""
  return net.constant() if net.constant else net


def gradients(net: Net, constant: Net | None, weights, mixers, piece, *where):
  """Reads a chunk and differentiates its objective by the levels' weights.

  Args:
    net: the network.
    constant: `still(net)` if the gradients are constants for any derivative
      taken later; else None.
    weights: what the levels have written.
    mixers: state at the chunk's start.
    piece: the chunk.
    *where: `length_B` and `alive_BxL`, see `Net`.

  Returns:
    (mixers, y, gradients like `weights`, sum_B, count_B).
  """
  if constant is None:
    return _gradients(net, weights, mixers, piece, *where)
  # Of constants from end to end, so that no derivative of it is even written
  # down: kernels have no second one. That the chunk is read twice is for the
  # compiler to see.
  inputs = jax.lax.stop_gradient((weights, mixers, piece))
  _, _, *found = _gradients(constant, *inputs, *where)
  new, y, _ = net.forward(weights, mixers, piece, *where)
  return new, y, *jax.lax.stop_gradient(found)


def _gradients(net: Net, weights, mixers, piece, *where):
  def through(weights):
    new, y, seen = net.forward(weights, mixers, piece, *where)
    sum_B, count_B = net.loss(weights, y, seen, piece, where[0])
    return sum_B.sum(), (new, y, sum_B, count_B)

  if net.through:
    _, pull, (new, y, sum_B, count_B) = jax.vjp(through, weights, has_aux=True)
  else:
    new, y, seen = net.forward(weights, mixers, piece, *where)

    def local(weights):
      sum_B, count_B = net.loss(weights, y, seen, piece, where[0])
      return sum_B.sum(), (sum_B, count_B)

    _, pull, (sum_B, count_B) = jax.vjp(local, weights, has_aux=True)
  (grads,) = pull(jnp.ones((), jnp.float32))
  return new, y, grads, sum_B, count_B


def written(levels):
  """What each level adds to its slow weights."""
  return tuple(levels_.weights(level) for level in levels)


def commit(cfg: StreamConfig, levels, rates, k: int, due_B=None):
  """Level k commits where it is due; the next faster one starts again.

  `due_B` None is everywhere, see `level.commit`.
  """
  levels = list(levels)
  levels[k] = levels_.commit(cfg.update, levels[k], rates[k], due_B)
  if k and cfg.nested:
    levels[k - 1] = levels_.restart(
      cfg.update, levels[k - 1], rates[k - 1], due_B
    )
  return tuple(levels)
