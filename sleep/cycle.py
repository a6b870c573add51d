"""One night: compute, consolidate, update, dream, gate.

Sleep sections 2.2-2.3, the v2 protocol, for every pair of levels that is due,
the slowest first, so that a receiver has been freed before it is given more:

    compute      what is pending in the sequences of the day is committed
    consolidate  the sender k is reset and its slots are emptied; the receiver's
                 new slot learns what is then missing (`sleep/seed.py`)
    update       what the sequences of the day had written there is gone, too

The teacher of all pairs is the model as it fell asleep, so that what one pair
fails to learn is not the next one's truth. Slots are slow weights that all
sequences share; each sequence of the batch is a teacher of its own. The slowest
levels' writes go to slots of those levels themselves (see `sleep/grow.py`).

Then, if there are tasks, the model dreams about them by its slow weights alone:
what helps only along with what one sequence holds is no use to the others. What
dreams teach it goes on in the slot that the slowest of the night's receivers
was given last.

`night` is a pure transition: it gives a new model and state, or those it was
given. `lineage.record` makes a version of it: first the checkpoint, then the
line that names it. A night that is killed has done neither.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.cms.level import norm
from nestax.models import model_state
from nestax.sleep import consolidate, gate, given, grow, rounds, texts
from nestax.sleep import reader as readers
from nestax.sleep.objective import Side
from nestax.sleep.reader import Said
from nestax.sleep.task import Task
from nestax.sleep.texts import Day
from nestax.sleep.tools import Tools


class Night(NamedTuple):
  """What a night came to.

  Attributes:
    params: of the model that wakes up.
    state: of its sequences.
    decision: of the gate.
    owners: those whose day was consolidated; none if it was rolled back.
    metrics: numbers by name, losses in nats a token.
    seconds: wall time by phase.
  """

  params: Any
  state: model_state.ModelState
  decision: gate.Decision
  owners: tuple[str, ...]
  metrics: dict[str, float]
  seconds: dict[str, float]


def night(
  tools: Tools,
  params,
  state: model_state.ModelState,
  day: Day,
  core: Said,
  number: int,
  key,
  tell: Callable[[int, int, dict], None] | None = None,
  tasks: Sequence[Task] = (),
  past: Said | None = None,
) -> Night:
  """Sleeps once; arrays that it is given are not changed.

  Args:
    tools: of the model.
    params: unboxed.
    state: of the sequences, levels as they have learned.
    day: from `texts.gather`.
    core: texts of the core set, on which the model may not get worse.
    number: of the night, from 1: says which pairs are due.
    key: of all that is random.
    tell: given sender, updates made and their numbers.
    tasks: to dream about; without any, there are no dreams.
    past: texts of earlier days, rows of `texts.length` tokens: what the slow
      weights say there is kept, along with what they say by themselves.

  Raises:
    SlotsError: if a receiver has no free slot, before anything is done.
    consolidate.MergeError: if merging its slots would lose too much.
    TaskError: if a task does not fit, before anything is done.
    ValueError: as soon, for a day of other rows than the state's, ids that are
      not in the vocabulary, and the like, see `given`.
  """
  cfg, how, clock = tools.cfg, tools.how, _Clock()
  given.night(cfg, params, state, day, core, number, past)
  due = how.due(number, len(cfg.groups))
  if tasks:
    rounds.prepare(how.dream, tasks)
    given.tasks(cfg, tasks)
  check_room(tools, params, number)
  rows = np.array(day.rows)
  chosen_B = jnp.zeros((_batch(state),), bool).at[rows].set(True)
  with clock('compute'):
    awake = tools.compute(params, state)
    # others are not asleep: what they read goes on to wait for its commit
    awake = jax.block_until_ready(grow.where_owners(chosen_B, awake, state))
  context = tuple(
    jax.tree.map(lambda x: x[:, rows], tree) for tree in readers.learned(awake)
  )
  teacher = Side(params, context)
  texts_key, key = jax.random.split(jax.random.fold_in(key, number))
  with clock('texts'):
    made, kept_texts = _texts(tools, teacher, day, texts_key, past)
  with clock('gate'):
    metrics = _losses(tools, 'before', params, day, core)
    metrics['day_dusk'] = _dusk_loss(tools, teacher, day)
  metrics['rehearsed'] = 0 if past is None else len(past.length_B)
  grown, kept, index = params, context, {}
  for k in due:
    metrics[f'written_{k}'] = float(norm(context[k]).mean())
    kept = consolidate.reset(kept, k)
    with clock(f'consolidate every {grow.period(cfg, k)}'):
      grown, index[grow.receiver(cfg, k)], said = consolidate.move(
        tools, teacher, Side(grown, kept), k, day, made, kept_texts, key, tell
      )
    metrics |= said
    awake = grow.empty(cfg, awake, k, chosen_B)
  if tasks:
    slowest = max(index)
    with clock('dream'):
      grown, said = consolidate.dream_on(
        tools, grown, slowest, index[slowest], tasks, key
      )
    metrics |= said
  with clock('gate'):
    metrics |= _losses(tools, 'after', grown, day, core)
    decision = _decide(how.gate, metrics)
  metrics |= {
    f'slots_{k}': grow.used(cfg, grown, k) for k in range(len(cfg.groups))
  }
  if not decision.accepted:
    return Night(params, state, decision, (), metrics, clock.seconds)
  return Night(grown, awake, decision, day.names, metrics, clock.seconds)


def check_room(tools: Tools, params, number: int) -> None:
  """Raises a SlotsError if that night finds no free slot, and may not merge."""
  if tools.how.full == 'error':
    due = tools.how.due(number, len(tools.cfg.groups))
    grow.check_room(tools.cfg, params, due)


def _texts(tools: Tools, teacher: Side, day: Day, key, past: Said | None):
  """What a night is learned from, and what it is to leave as it is."""
  # by splitting alone: `fold_in(key, 1)` is one of the halves of a split key
  made_key, kept_key = jax.random.split(key)
  speak = functools.partial(tools.speak, *teacher)
  made = texts.make(tools.how.texts, tools.words.bos, speak, day, made_key)
  alone = functools.partial(tools.speak, teacher.params, None)
  kept = texts.kept(tools.how.texts, tools.words.bos, alone, kept_key, past)
  return jax.block_until_ready((made, kept))


def _losses(tools: Tools, when: str, params, day: Day, core: Said):
  """Nats a token on core and day by the slow weights alone."""
  core_loss = gate.loss(
    tools.reader, params, None, core.tokens_BxL, core.length_B
  )
  day_loss = gate.loss(tools.reader, params, None, *_all(day))
  return {f'core_{when}': core_loss, f'day_{when}': day_loss}


def _decide(how: gate.GateConfig, metrics) -> gate.Decision:
  before, after = (
    {name: metrics[f'{name}_{when}'] for name in ('core', 'day')}
    for when in ('before', 'after')
  )
  return gate.decide(how, before, after)


def _all(day: Day):
  """All texts of a day, and their lengths."""
  tokens = np.concatenate([read.tokens_BxL for read in day.read])
  return tokens, np.concatenate([read.length_B for read in day.read])


def _dusk_loss(tools: Tools, teacher: Side, day: Day) -> float:
  """Nats a token on each owner's day by the model that has read it."""
  nats = count = 0.0
  for i, read in enumerate(day.read):
    context = jax.tree.map(lambda x, i=i: x[:, i : i + 1], teacher.context)
    scored = int((read.length_B - 1).sum())
    mean = gate.loss(
      tools.reader, teacher.params, context, read.tokens_BxL, read.length_B
    )
    nats, count = nats + mean * scored, count + scored
  return nats / count


def _batch(state) -> int:
  return state.levels.clock_B.shape[0]


class _Clock:
  """Adds up wall time by phase."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, phase: str):
    start = time.perf_counter()
    yield
    spent = time.perf_counter() - start
    self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
