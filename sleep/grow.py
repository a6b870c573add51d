"""Growth and pruning: the slot a level is given, the levels that are emptied.

The levels of period k are a night's sender k. What they hold moves into a new
expert slot of the next slower ones, their receiver; the slowest levels have
nobody behind them and move what each sequence has written into slots of their
own, which are slow weights that all sequences share (Sleep section 3.2; the
paper's chain ends at a level that never sends).
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestax.cms import experts
from nestax.cms import level as levels_
from nestax.cms.experts import Slots, SlotsError
from nestax.cms.level import Theta
from nestax.models import (
  axes,
  border,
  language_model,
  level_state,
  model_state,
  segments,
)
from nestax.models.config import ModelConfig
from nestax.models.continuum import Segment

NAMES = dict(zip(Slots._fields, ('a', 'b', 'logit', 'active')))


class New(NamedTuple):
  """One slot in each of n blocks: all that a consolidation trains."""

  a_nxDxR: jax.Array
  b_nxRxD: jax.Array
  logit_n: jax.Array


class Merged(NamedTuple):
  """What merging a level's slots gave."""

  params: Any
  error: jax.Array  # the worst block's, see `experts.Fold`


def check(cfg: ModelConfig) -> None:
  """Raises a SlotsError for a model that cannot sleep, saying why."""
  if not cfg.adapting:
    raise SlotsError(
      f'no level of this model learns inside a sequence (family '
      f'{cfg.family!r}, cms.blocks={cfg.cms.blocks!r}): there is nothing to '
      'consolidate'
    )
  if not cfg.cms.slots:
    raise SlotsError(
      'cms.slots=0: the model has no expert slots to grow into; give each '
      'level some when it is made'
    )


def equip(
  cfg: ModelConfig, params, S: int, rank: int, key, scope: str = 'shared'
):
  """Gives a model that has no slots S of them a level: (cfg, params).

  They are masked and empty: no logit changes. With the scope 'owner' those of
  the parameters stay so, see `sleep.owners`.

  Raises:
    SlotsError: if it has slots already, or these cannot be.
    ValueError: for an unknown scope.
  """
  if cfg.cms.slots:
    raise SlotsError(
      f'the model has {cfg.cms.slots} expert slots a level already'
    )
  border.bare(params)
  blocks = dict(params['blocks'])
  for i in range(len(cfg.schedule.levels)):
    new = experts.init(jax.random.fold_in(key, i), S, cfg.D, rank, (cfg.N,))
    named = {NAMES[field]: x for field, x in new._asdict().items()}
    blocks[f'level_{i}'] = blocks[f'level_{i}'] | {'slots': named}
  cms = dataclasses.replace(cfg.cms, slots=S, rank=rank, scope=scope)
  return dataclasses.replace(cfg, cms=cms), params | {'blocks': blocks}


def receiver(cfg: ModelConfig, k: int) -> int:
  """The levels that sender k's content goes to; the slowest ones' own slots."""
  _check_level(cfg, k)
  return min(k + 1, len(cfg.groups) - 1)


def _check_level(cfg: ModelConfig, k: int) -> None:
  if not 0 <= k < len(cfg.groups):
    raise SlotsError(
      f'levels {k}: the model has {len(cfg.groups)} kinds that learn, the '
      f'fastest is 0 and the slowest {len(cfg.groups) - 1}'
    )


def _check_slot(cfg: ModelConfig, index) -> None:
  known = not isinstance(index, jax.core.Tracer)
  if known and not 0 <= index < cfg.cms.slots:
    raise SlotsError(
      f'slot {index}: a level has {cfg.cms.slots}, from 0 to '
      f'{cfg.cms.slots - 1}'
    )


def slots(cfg: ModelConfig, params, k: int) -> Slots:
  """The slots of the levels of period k, with a leading axis of blocks."""
  _check_level(cfg, k)
  group = cfg.groups[k]
  own = params['blocks'][f'level_{group.slot}']['slots']
  blocks = np.array(group.blocks)
  return Slots(*(own[NAMES[field]][blocks] for field in Slots._fields))


def replace(cfg: ModelConfig, params, k: int, new: Slots):
  """Parameters with these slots; all other arrays are the same ones."""
  group, blocks = cfg.groups[k], np.array(cfg.groups[k].blocks)
  name = f'level_{group.slot}'
  own = params['blocks'][name]
  changed = {
    NAMES[field]: own['slots'][NAMES[field]].at[blocks].set(value)
    for field, value in zip(Slots._fields, new)
  }
  level = own | {'slots': changed}
  return params | {'blocks': params['blocks'] | {name: level}}


def grow(cfg: ModelConfig, params, k: int):
  """Activates the next free slot of the levels of period k; no logit changes.

  Returns:
    (params, index of the slot).

  Raises:
    SlotsError: naming the level, if all its slots are used up.
  """
  check(cfg)
  own = slots(cfg, params, k)
  try:
    index = experts.spare(own)
  except SlotsError as error:
    raise SlotsError(f'levels of period {period(cfg, k)}: {error}') from None
  return replace(cfg, params, k, experts.activate(own, index)), index


def check_room(cfg: ModelConfig, params, senders) -> None:
  """Raises a SlotsError if a night's receivers have too few free slots.

  Args:
    cfg: the model.
    params: its parameters.
    senders: of the night, in their order; those that give to others are freed.
  """
  S = cfg.cms.slots
  room = [S - used(cfg, params, k) for k in range(len(cfg.groups))]
  for k in senders:
    to = receiver(cfg, k)
    if not room[to]:
      raise SlotsError(
        f'levels of period {period(cfg, to)}: all {S} expert slots of the '
        'level are used up, or will be in this night: merge them into the '
        "level (full='merge'), or begin with a model of more (cms.slots)"
      )
    room[to] -= 1
    if to != k:
      room[k] = S


def used(cfg: ModelConfig, params, k: int) -> int:
  """How many slots of the levels of period k are active."""
  active_nxS = np.asarray(slots(cfg, params, k).active_S)
  return int((active_nxS > 0).any(0).sum())


def period(cfg: ModelConfig, k: int) -> int:
  """Tokens between commits of the levels k."""
  _check_level(cfg, k)
  return cfg.stream.periods[k]


def take(cfg: ModelConfig, params, k: int, index) -> New:
  """What slot `index` of the levels of period k holds; int or traced."""
  _check_slot(cfg, index)
  a, b, logit, _ = slots(cfg, params, k)
  return New(*(jnp.take(x, index, axis=1) for x in (a, b, logit)))


def put(cfg: ModelConfig, params, k: int, index, new: New):
  """Parameters whose slot `index` holds `new`; undoes `take`."""
  _check_slot(cfg, index)
  own = slots(cfg, params, k)
  return replace(
    cfg,
    params,
    k,
    own._replace(
      a_SxDxR=own.a_SxDxR.at[:, index].set(new.a_nxDxR),
      b_SxRxD=own.b_SxRxD.at[:, index].set(new.b_nxRxD),
      logit_S=own.logit_S.at[:, index].set(new.logit_n),
    ),
  )


def put_among(cfg: ModelConfig, params, ks, chosen, index, new: New):
  """`put` at that of the levels `ks` that `chosen` is, an int or traced.

  The levels are of the same blocks, so that their slots are of one shape.
  """
  if len(ks) == 1:
    return put(cfg, params, *ks, index, new)
  for k in ks:
    own = take(cfg, params, k, index)
    new_or_own = jax.tree.map(
      lambda x, y, k=k: jnp.where(chosen == k, x, y), new, own
    )
    params = put(cfg, params, k, index, new_or_own)
  return params


def free(cfg: ModelConfig, params, k: int, key):
  """Empties all slots of the levels of period k: nothing of them is left."""
  own = slots(cfg, params, k)
  return replace(cfg, params, k, experts.free(own, True, key))


def silenced(cfg: ModelConfig, params, k: int):
  """Parameters as if the levels of period k had no slots: all are masked."""
  own = slots(cfg, params, k)
  off = own._replace(active_S=jnp.zeros_like(own.active_S))
  return replace(cfg, params, k, off)


def empty(cfg: ModelConfig, state, k: int, chosen_B=None):
  """Resets what sequences have written on the levels of period k, exactly.

  Args:
    cfg: the model.
    state: ModelState.
    k: the levels.
    chosen_B: bool, which sequences; None for all.
  """
  _check_level(cfg, k)
  old = state.levels.levels[k]
  B = old.count_B.shape[0]
  chosen_B = jnp.ones((B,), bool) if chosen_B is None else chosen_B
  # the counts of commits stay: they are telemetry, not memory
  fresh = level_state.init_levels(cfg, B)[k]._replace(commits_B=old.commits_B)
  new = levels_.where_rows(chosen_B, fresh, old)
  levels = (*state.levels.levels[:k], new, *state.levels.levels[k + 1 :])
  return state._replace(levels=state.levels._replace(levels=levels))


def where_owners(mask_B, new, old):
  """A state with the rows of `new` where the mask says so, else of `old`."""
  others = iter(jax.tree.leaves(old))

  def one(names, x):
    axis = names.index('batch')
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    return jnp.where(mask_B.reshape(shape), x, next(others))

  return axes.map_names(one, model_state.state_axes(new), new)


def merge(
  cfg: ModelConfig,
  params,
  k: int,
  tokens_BxL,
  key,
  ridge: float = 1e-4,
  length_B=None,
) -> Merged:
  """Folds the slots of the levels of period k into their MLPs, and frees them.

  What an MLP cannot express is lost: the error says how much, and the caller
  decides (see `experts.fold`).

  Args:
    cfg: the model.
    params: its parameters.
    k: the levels.
    tokens_BxL: texts whose inputs to the levels are fitted; the last quarter
      of the rows, at least one, measures the error instead.
    key: of the freed slots' first factors.
    ridge: see `experts.fold`.
    length_B: tokens of each row that count, the first ones; None for all.

  Raises:
    SlotsError: for fewer than two rows.
  """
  rows = tokens_BxL.shape[0]
  if rows < 2:
    raise SlotsError(f'{rows} rows to merge on: at least 2, one to check with')
  params = nn.unbox(params)
  group, held = cfg.groups[k], max(1, rows // 4)
  keys = inputs(cfg, params, tokens_BxL)[group.slot][np.array(group.blocks)]
  if length_B is not None:
    here_1xL = jnp.arange(tokens_BxL.shape[1])[None]
    counts_BxL = here_1xL < jnp.asarray(length_B)[:, None]
    # of an input of zeros neither MLP nor slots say anything
    keys = jnp.where(counts_BxL[None, ..., None], keys, 0)
  fit, rest = (
    x.reshape(len(group.blocks), -1, cfg.D)
    for x in (keys[:, :-held], keys[:, -held:])
  )
  name, blocks = f'level_{group.slot}', np.array(group.blocks)
  own = params['blocks'][name]
  theta = Theta(*(own[part][blocks] for part in ('gate', 'up', 'down')))
  fold = jax.vmap(lambda *parts: experts.fold(*parts, ridge))
  done = fold(theta, slots(cfg, params, k), fit, rest)
  level = own | {'down': own['down'].at[blocks].set(done.theta.down_FxD)}
  params = params | {'blocks': params['blocks'] | {name: level}}
  return Merged(free(cfg, params, k, key), done.error.max())


def inputs(cfg: ModelConfig, params, tokens_BxL):
  """The normalised inputs of every level, `[N, B, L, D]` each."""
  # delta gradient descent is the optimiser that asks blocks for them
  cms = dataclasses.replace(cfg.cms, optimizer='dgd')
  asking = dataclasses.replace(cfg, cms=cms)
  model = language_model.LanguageModel(cfg)
  x_BxLxD = model.apply(
    {'params': params}, tokens_BxL, method=lambda m, t: m.embed(t)
  )
  _, _, keys = segments.run_blocks(
    asking, params['blocks'], Segment(0, cfg.N, None), None, x_BxLxD, None
  )
  return keys
