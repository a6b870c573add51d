"""What the levels that learn carry for every sequence, fresh, and its axes."""

import jax
import jax.numpy as jnp

from nestax.cms import experts
from nestax.cms import level as levels_
from nestax.cms.level import LevelState, Theta
from nestax.cms.stream import Piece, StreamState
from nestax.cms.stream import init_state as init_stream
from nestax.models import axes
from nestax.models import block as blocks
from nestax.models.config import ModelConfig


def init_levels(cfg: ModelConfig, B: int):
  """Levels that have learned nothing, one state a period, fastest first."""
  nested, last = cfg.stream.nested, len(cfg.groups) - 1
  return tuple(
    levels_.init_state(
      cfg.stream.update,
      len(group.blocks),
      B,
      cfg.D,
      cfg.schedule.levels[group.slot].F,
      nested and k < last,
    )
    for k, group in enumerate(cfg.groups)
  )


def init_state(cfg: ModelConfig, B: int, mixers) -> StreamState:
  """State of the levels; `mixers` is the fresh state of all blocks."""
  return init_stream(
    init_levels(cfg, B),
    jax.tree.map(lambda x: x[cfg.adapting[0] :], mixers),
    cfg.stream.periods[0],
    B,
    cfg.D,
    cfg.compute_dtype,
  )


def init_owned(cfg: ModelConfig, B: int) -> tuple[experts.Slots, ...] | None:
  """Masked and empty expert slots of B sequences' own, leaves `[N, B, ...]`.

  One for each level of a block; None where slots are shared, or there are none.
  The first factors of every sequence are the same, whatever B is.
  """
  if cfg.cms.scope == 'shared' or not cfg.cms.slots:
    return None
  S, D, rank = cfg.cms.slots, cfg.D, cfg.cms.rank

  def one(level):
    key = jax.random.fold_in(jax.random.key(0), level)
    slots = experts.init(key, S, D, rank, (cfg.N,))
    return jax.tree.map(
      lambda x: jnp.repeat(x[:, None], B, axis=1, total_repeat_length=B), slots
    )

  return tuple(map(one, range(len(cfg.schedule.levels))))


def owned_axes() -> experts.Slots:
  """The names of the axes of such slots."""
  slots = experts.Slots(('embed', 'memory'), ('memory', 'embed'), (), ())
  return axes.stacked(slots, 'layers', 'batch', None)


def level_axes(state: LevelState) -> LevelState:
  """The names of the axes of a level's leaves, see `axes.map_names`."""
  into, row = ('layers', 'batch', 'embed', 'mlp'), ('batch',)
  theta = Theta(into, into, ('layers', 'batch', 'mlp', 'embed'))
  kinds = {Theta: theta, type(None): None}
  return LevelState(*(kinds.get(type(part), row) for part in state))


def state_axes(state: StreamState, mixers) -> StreamState:
  """The same for the whole state; `mixers` are the names of the mixers'."""
  row = ('batch',)
  return StreamState(
    levels=tuple(map(level_axes, state.levels)),
    clock_B=row,
    skip_B=row,
    held=Piece(('batch', 'length', 'activation'), *[('batch', 'length')] * 2),
    held_B=row,
    boundary=blocks.BlockState(mixers),
    surprise_B=row,
  )
