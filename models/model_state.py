"""The state of sequences: made fresh, emptied, taken by rows, laid out."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.cms import resume
from nestax.cms.experts import Slots
from nestax.cms.stream import StreamState
from nestax.models import axes, border, level_state, telemetry
from nestax.models import block as blocks
from nestax.models.config import ModelConfig
from nestax.models.telemetry import Telemetry


class ModelState(NamedTuple):
  """Everything per sequence.

  Attributes:
    blocks: of the mixers, leaves `[N, B, ...]`.
    levels: of the levels that learn (`cms.stream.StreamState`), or None.
    owned: expert slots of every sequence's own, see `level_state.init_owned`.
  """

  blocks: blocks.BlockState
  levels: StreamState | None
  owned: tuple[Slots, ...] | None = None


def init_mixers(cfg: ModelConfig, batch: int, length: int):
  """What the mixers alone carry: `blocks` of `init_state`, same arguments."""
  one = blocks.init_state(cfg, batch, length)
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x[None], (cfg.N, *x.shape)), one
  )


def init_state(cfg: ModelConfig, batch: int, length: int) -> ModelState:
  """State of `batch` fresh sequences.

  Args:
    cfg: the model.
    batch: number of sequences.
    length: tokens that attention must be able to look back on; a memory
      needs none of it.

  Raises:
    ValueError: for no number of sequences, or attention without a length.
  """
  border.batch(batch)
  mixers = init_mixers(cfg, batch, length)
  owned = level_state.init_owned(cfg, batch)
  if not cfg.stream:
    return ModelState(mixers, None, owned)
  levels = level_state.init_state(cfg, batch, mixers)
  # arrays of their own, so that a state can be donated
  return ModelState(mixers, jax.tree.map(jnp.copy, levels), owned)


@functools.lru_cache(maxsize=64)
def like(cfg: ModelConfig, owned: bool):
  """Shapes of a state of one sequence, and the names of its axes."""
  shapes = jax.eval_shape(lambda: init_state(cfg, 1, 1))
  if not owned:  # those of the parameters are then read
    shapes = shapes._replace(owned=None)
  return shapes, state_axes(shapes)


def forget_levels(cfg: ModelConfig, state: ModelState) -> ModelState:
  """Empties the levels of every sequence, as a document's start does.

  The mixers keep what they have read. In the middle of a chunk, the rest of
  it is not learned from.
  """
  if not cfg.stream:
    return state
  levels = resume.forget(cfg.stream, state.levels)
  return state._replace(levels=levels)


def forget_mixers(
  cfg: ModelConfig, state: ModelState, length: int
) -> ModelState:
  """Empties what the mixers have read, as a document's start does.

  The levels keep what they have written. To be called where a chunk of theirs
  has just ended, so that no token waits that was read with what is emptied.

  Args:
    cfg: the model.
    state: of any sequences.
    length: as `init_state` takes it.
  """
  batch = jax.tree.leaves(state.blocks)[0].shape[1]
  mixers = init_mixers(cfg, batch, length)
  state = state._replace(blocks=mixers)
  if state.levels is None:
    return state
  fresh = level_state.init_state(cfg, batch, mixers).boundary
  # arrays of their own, as in `init_state`
  levels = state.levels._replace(boundary=jax.tree.map(jnp.copy, fresh))
  return state._replace(levels=levels)


def level_telemetry(state: ModelState) -> Telemetry:
  """What the levels of a state did; no elements if no level learns."""
  if state.levels is None:
    return telemetry.none()
  levels = state.levels
  return telemetry.mean(telemetry.by_row(levels.levels, levels.surprise_B))


def state_axes(state: ModelState) -> ModelState:
  """The names of the axes of every leaf, a prefix tree of the state."""
  mixers = axes.stacked(state.blocks.mixer.axes(), 'layers')
  levels = state.levels and level_state.state_axes(state.levels, mixers)
  owned = state.owned and (level_state.owned_axes(),) * len(state.owned)
  return ModelState(blocks.BlockState(mixers), levels, owned)


def take_row(state: ModelState, row: int) -> ModelState:
  """The state of one sequence, a batch of one; IndexError without that row."""
  row = border.row(state.blocks, row)

  def one(names, x):
    return jax.lax.slice_in_dim(x, row, row + 1, axis=names.index('batch'))

  return axes.map_names(one, state_axes(state), state)


def put_row(state: ModelState, row: int, new: ModelState) -> ModelState:
  """The state with one sequence's replaced; `new` is a batch of one.

  Raises:
    IndexError, ValueError: for a row that is not there, a `new` that is none.
  """
  row = border.row(state.blocks, row)
  border.same(new, jax.eval_shape(lambda: take_row(state, 0)))
  new = iter(jax.tree.leaves(new))

  def one(names, x):
    axis = names.index('batch')
    return jax.lax.dynamic_update_slice_in_dim(x, next(new), row, axis)

  return axes.map_names(one, state_axes(state), state)


def state_shardings(mesh, state):
  """Shardings of a state as `init_state` makes it, a tree like it.

  Any other state has its blocks and sequences in front, and lies by sequences.
  """
  if isinstance(state, ModelState):
    return axes.state_shardings(mesh, state, state_axes(state))
  names = jax.tree.map(
    lambda x: ('layers', 'batch', *[None] * (x.ndim - 2)), state
  )
  return axes.state_shardings(mesh, state, names)
