"""Nights of models of one's own: slots in the owner's state, common weights.

With `cms.scope='owner'` an owner's expert slots are part of the state, and go
when it goes. Their night is that of `cycle.py` on parameters whose slots are
the owner's: what it gives is put back into the state, and the parameters stay
as they are. Every owner sleeps alone, and has a gate alone.

Slots cannot be merged here: the MLP that they would be folded into belongs to
everybody.
"""

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from nestax.cms.experts import Slots, SlotsError
from nestax.models import model_state
from nestax.models.config import ModelConfig
from nestax.models.model_state import ModelState
from nestax.sleep import cycle, grow, texts
from nestax.sleep.gate import Decision
from nestax.sleep.reader import Said
from nestax.sleep.texts import Day


def check(cfg: ModelConfig, full: str) -> None:
  """Raises a SlotsError if nights of this model cannot go as asked."""
  if cfg.cms.scope == 'owner' and full == 'merge':
    raise SlotsError(
      "full='merge' and cms.scope='owner': an owner's slots cannot be merged "
      "into an MLP that all owners share; take full='error', and slots for all "
      'nights to come when they are given'
    )


def personal(params, state: ModelState, row: int):
  """The parameters as the owner of one row of the state has them.

  All arrays but those of the slots are the ones of `params`. Where slots are
  shared, so are the parameters.
  """
  if state.owned is None:
    return params
  blocks = dict(params['blocks'])
  for i, slots in enumerate(state.owned):
    own = {grow.NAMES[k]: x[:, row] for k, x in slots._asdict().items()}
    blocks[f'level_{i}'] = blocks[f'level_{i}'] | {'slots': own}
  return params | {'blocks': blocks}


def keep(cfg: ModelConfig, params, state: ModelState) -> ModelState:
  """The state of one owner, with the slots that personal parameters hold."""
  owned = []
  for i in range(len(cfg.schedule.levels)):
    own = params['blocks'][f'level_{i}']['slots']
    owned.append(Slots(*(own[grow.NAMES[k]][:, None] for k in Slots._fields)))
  return state._replace(owned=tuple(owned))


def used(cfg: ModelConfig, params, state: ModelState) -> list[int]:
  """Active slots of each period's levels; of the owner who has most."""
  rows = range(state.levels.clock_B.shape[0]) if state.owned else [0]
  each = [personal(params, state, row) for row in rows]
  return [
    max(grow.used(cfg, own, k) for own in each) for k in range(len(cfg.groups))
  ]


def check_room(tools, params, state: ModelState, day: Day, number: int) -> None:
  """Raises a SlotsError if an owner of the day has no free slot that night."""
  rows = day.rows if state.owned else day.rows[:1]
  for row in rows:
    cycle.check_room(tools, personal(params, state, row), number)


def night(
  tools, params, state, day: Day, core, number, key, tell=None, tasks=(),
  past=None, earlier: Mapping[str, Said] | None = None,
) -> cycle.Night:  # fmt: skip
  """`cycle.night` for slots of either scope, with its arguments.

  `earlier` are rows of each owner's earlier days, kept along with `past`: all
  of them where slots are shared, and where they are not each owner's own by
  that owner alone.

  Of owners who sleep alone the metrics are means; the owners of the result are
  those whose own gate let them through, and it is accepted if one did.

  Raises:
    SlotsError, TaskError: as `cycle.night`; then nobody has slept.
  """
  earlier = earlier or {}
  if state.owned is None:
    past = texts.joined([past, *earlier.values()])
    return cycle.night(
      tools, params, state, day, core, number, key, tell, tasks, past
    )
  check(tools.cfg, tools.how.full)
  slept = {}
  for row, alone in _apart(day):
    mine = model_state.take_row(state, row)
    # without slots in the state, those of the parameters are read
    slept[row] = cycle.night(
      tools,
      personal(params, state, row),
      mine._replace(owned=None),
      alone,
      core,
      number,
      jax.random.fold_in(key, row),
      tell,
      tasks,
      texts.joined([past, earlier.get(alone.names[0])]),
    )
  for row, one in slept.items():
    if one.decision.accepted:
      mine = keep(tools.cfg, one.params, one.state)
      state = model_state.put_row(state, row, mine)
  return _together(params, state, day, list(slept.values()))


def _apart(day: Day) -> Iterator[tuple[int, Day]]:
  """(row of the state, day of its owner alone), whose state is a batch of 1."""
  for row, name, read in zip(day.rows, day.names, day.read):
    yield row, day._replace(rows=(0,), names=(name,), read=(read,))


def _together(params, state, day: Day, slept) -> cycle.Night:
  accepted = [one.decision.accepted for one in slept]
  said = [
    f'{name}: {one.decision.reason}' for name, one in zip(day.names, slept)
  ]

  def means(dicts):
    names = {name: None for one in dicts for name in one}
    return {
      name: float(np.mean([one[name] for one in dicts if name in one]))
      for name in names
    }

  spent = means([one.seconds for one in slept])
  return cycle.Night(
    params,
    state,
    Decision(any(accepted), '; '.join(said)),
    tuple(name for name, yes in zip(day.names, accepted) if yes),
    means([one.metrics for one in slept]),
    {phase: seconds * len(slept) for phase, seconds in spent.items()},
  )
