"""One night: compute, consolidate, update, dream, gate.

Sleep sections 2.2-2.3, the v2 protocol, for every pair of levels that is due,
the slowest first, so that a receiver has been freed before it is given more:

    compute      what is pending in the sequences is committed
    consolidate  the sender k is reset and its slots are hidden; the receiver's
                 new slot learns what is then missing (`sleep/seed.py`)
    update       the sender's slots and its writes are gone

The teacher of all pairs is the model as it fell asleep, so that what one pair
fails to learn is not the next one's truth. Slots are slow weights that all
sequences share; each sequence of the batch is a teacher of its own. The slowest
levels' writes go to slots of those levels themselves (see `sleep/grow.py`).

Then, if there are tasks, the model dreams about them by its slow weights alone:
what helps only along with what one sequence holds is no use to the others. What
dreams teach it goes on in the slot that the slowest of the night's receivers
was given last.

`night` is a pure transition: it gives a new model and state, or those it was
given. `record` makes a version of it: first the checkpoint, then the line of
lineage that names it. A night that is killed has done neither.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.cms.experts import SlotsError
from nestax.cms.level import norm
from nestax.models import language_model
from nestax.models.config import ModelConfig
from nestax.sleep import dream, gate, grow, seed, texts
from nestax.sleep import reader as readers
from nestax.sleep.dream import DreamConfig, Task
from nestax.sleep.gate import GateConfig, Lineage, Version
from nestax.sleep.reader import Reader, Said
from nestax.sleep.seed import SeedConfig, Side
from nestax.sleep.texts import Day, TextsConfig, Words

FULL = ('error', 'merge')


@dataclasses.dataclass(frozen=True)
class CycleConfig:
  """A night.

  Attributes:
    seed: how a slot learns.
    texts: what it learns from.
    gate: what a night may cost.
    dream: how it dreams, if it is given tasks.
    every: the pair with sender k is due in nights that are multiples of
      `every ** k`.
    full: if a receiver has no free slot, 'error' ends the night, 'merge' folds
      its slots into its MLP first.
    lost: greatest error of a merge, see `experts.fold`; above it, an error.
  """

  seed: SeedConfig = SeedConfig()
  texts: TextsConfig = TextsConfig()
  gate: GateConfig = GateConfig()
  dream: DreamConfig = DreamConfig()
  every: int = 1
  full: str = 'error'
  lost: float = 0.2

  def __post_init__(self):
    if self.full not in FULL:
      raise ValueError(f'full={self.full!r}: one of {", ".join(FULL)}')
    if self.every < 1:
      raise ValueError(f'every={self.every}: at least 1')
    if not 0 <= self.lost <= 1:
      raise ValueError(f'lost={self.lost}: from 0 to 1')

  def due(self, night: int, P: int) -> tuple[int, ...]:
    """The senders of a night (from 1) of P levels, the slowest first."""
    return tuple(k for k in reversed(range(P)) if night % self.every**k == 0)


class Tools(NamedTuple):
  """The programs of all nights of a model, compiled once."""

  cfg: ModelConfig
  how: CycleConfig
  words: Words
  reader: Reader
  compute: Callable  # (params, state) -> state
  speak: Callable  # (params, context, prompts, key) -> Said
  seeds: tuple[seed.Programs, ...]  # by receiver
  dreams: tuple[dream.Programs, ...]  # by receiver


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
  state: language_model.ModelState
  decision: gate.Decision
  owners: tuple[str, ...]
  metrics: dict[str, float]
  seconds: dict[str, float]


def tools(cfg: ModelConfig, how: CycleConfig, words: Words) -> Tools:
  """Makes the programs.

  Raises:
    SlotsError: for a model that cannot sleep.
  """
  grow.check(cfg)
  reader = readers.of_model(cfg, words.allowed_V)

  def put(k, place, new):
    params, index = place
    return grow.put(cfg, params, k, index, new)

  puts = [functools.partial(put, k) for k in range(len(cfg.groups))]
  disturb = functools.partial(dream.random_expert, cfg)
  return Tools(
    cfg,
    how,
    words,
    reader,
    jax.jit(functools.partial(language_model.flush, cfg)),
    texts.speaker(how.texts, reader, words),
    tuple(seed.programs(how.seed, reader, put, words.eos) for put in puts),
    tuple(
      dream.programs(how.dream, reader, put, disturb, words.bos, words.eos)
      for put in puts
    ),
  )


def night(
  tools: Tools,
  params,
  state: language_model.ModelState,
  day: Day,
  core: Said,
  number: int,
  key,
  tell: Callable[[int, int, dict], None] | None = None,
  tasks: Sequence[Task] = (),
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

  Raises:
    SlotsError: if a receiver has no free slot and cannot be merged.
    TaskError: if a task does not fit, before anything is done.
  """
  cfg, how, clock = tools.cfg, tools.how, _Clock()
  if tasks:
    dream.prepare(how.dream, tasks)
  with clock('compute'):
    awake = jax.block_until_ready(tools.compute(params, state))
  rows = np.array(day.rows)
  context = tuple(
    jax.tree.map(lambda x: x[:, rows], tree) for tree in readers.learned(awake)
  )
  teacher = Side(params, context)
  texts_key, key = jax.random.split(jax.random.fold_in(key, number))
  with clock('texts'):
    speak = functools.partial(tools.speak, *teacher)
    made = texts.make(how.texts, tools.words.bos, speak, day, texts_key)
    jax.block_until_ready(made)
  metrics = _losses(tools, 'before', params, day, core)
  metrics['day_dusk'] = _dusk_loss(tools, teacher, day)
  grown, kept, index = params, context, {}
  chosen_B = jnp.zeros((_batch(state),), bool).at[rows].set(True)
  for k in how.due(number, len(cfg.groups)):
    metrics[f'written_{k}'] = float(norm(context[k]).mean())
    kept = _reset(kept, k)
    with clock(f'consolidate {k}'):
      grown, index[grow.receiver(cfg, k)], said = _consolidate(
        tools, teacher, Side(grown, kept), k, day, made, key, tell
      )
    metrics |= said
    awake = grow.empty(cfg, awake, k, chosen_B)
  if tasks:
    slowest = max(index)
    with clock('dream'):
      grown, said = _dream(tools, grown, slowest, index[slowest], tasks, key)
    metrics |= said
  with clock('gate'):
    metrics |= _losses(tools, 'after', grown, day, core)
    decision = gate.decide(
      how.gate,
      {name: metrics[f'{name}_before'] for name in ('core', 'day')},
      {name: metrics[f'{name}_after'] for name in ('core', 'day')},
    )
  metrics |= {
    f'slots_{k}': grow.used(cfg, grown, k) for k in range(len(cfg.groups))
  }
  if not decision.accepted:
    return Night(params, state, decision, (), metrics, clock.seconds)
  return Night(grown, awake, decision, day.names, metrics, clock.seconds)


def _consolidate(tools, teacher, student, k, day, made, key, tell):
  """Moves what the levels k hold into a slot: (params, its index, numbers)."""
  cfg, how = tools.cfg, tools.how
  to = grow.receiver(cfg, k)
  room_key, free_key, key = jax.random.split(jax.random.fold_in(key, k), 3)
  params, index, lost = _room(tools, student.params, to, day, room_key)
  if to != k:
    params = grow.free(cfg, params, k, free_key)
  blank = all(tree is None for tree in student.context)
  numbers: dict[str, float] = {f'lost_{to}': lost}

  def note(step, parts):
    if step == 1:
      numbers.update({f'{n}_{k}_first': float(x) for n, x in parts.items()})
    if tell:
      tell(k, step, parts)

  new, last = seed.run(
    how.seed,
    tools.seeds[to],
    teacher,
    Side(
      (params, jnp.asarray(index)),
      None if blank else _filled(student.context, teacher.context),
    ),
    grow.take(cfg, params, to, index),
    texts.drawer(made, len(day.rows), how.seed.rows),
    key,
    note,
  )
  numbers |= {f'{name}_{k}': float(x) for name, x in last.items()}
  return grow.put(cfg, params, to, index, new), index, numbers


def _dream(tools: Tools, params, k: int, index: int, tasks, key):
  """Goes on with slot `index` of the levels k in dreams: (params, numbers)."""
  cfg, how = tools.cfg, tools.how.dream
  trained, rounds, after = dream.run(
    how,
    tools.dreams[k],
    (params, jnp.asarray(index)),
    None,
    grow.take(cfg, params, k, index),
    tasks,
    jax.random.fold_in(key, len(cfg.groups)),  # no sender's key
  )
  first = rounds[0]
  results = [result for results in rounds for result in results]
  numbers = {
    'dream_before': np.mean([result.before for result in first]),
    'dream_best': np.mean([result.scores.max() for result in first]),
    'dream_paid': np.mean([result.rewards for result in results]),
    'dream_after': np.mean(after),
  }
  params = grow.put(cfg, params, k, index, trained)
  return params, {name: float(value) for name, value in numbers.items()}


def _reset(context, k: int):
  """The context without level k; None stands for a level that is reset."""
  return (*context[:k], None, *context[k + 1 :])


def _filled(context, like):
  """The context with zeros for the levels that are reset."""
  return tuple(
    jax.tree.map(jnp.zeros_like, old) if tree is None else tree
    for tree, old in zip(context, like)
  )


def _room(tools: Tools, params, k: int, day: Day, key):
  """A free slot of the levels k: (params, its index, error of a merge)."""
  cfg, how = tools.cfg, tools.how
  try:
    return *grow.grow(cfg, params, k), 0.0
  except SlotsError:
    if how.full == 'error':
      raise
  tokens = np.concatenate([read.tokens_BxL for read in day.read])
  # at least two texts: one to fit on, one to see what is lost
  tokens = np.resize(tokens, (max(2, len(tokens)), tokens.shape[1]))
  params, error = grow.merge(cfg, params, k, jnp.asarray(tokens), key)
  if not error <= how.lost:
    raise SlotsError(
      f'levels of period {grow.period(cfg, k)}: all slots are used up, and '
      f'merging them into the MLP would lose {float(error):.0%} of what they '
      f'say, more than {how.lost:.0%}; give the model more slots (cms.slots)'
    )
  return *grow.grow(cfg, params, k), float(error)


def _losses(tools: Tools, when: str, params, day: Day, core: Said):
  """Nats a token on core and day by the slow weights alone."""
  core_loss = gate.loss(
    tools.reader, params, None, core.tokens_BxL, core.length_B
  )
  day_loss = gate.loss(tools.reader, params, None, *_all(day))
  return {f'core_{when}': core_loss, f'day_{when}': day_loss}


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


def record(
  lineage: Lineage,
  how: CycleConfig,
  slept: Night,
  save: Callable[[int, Any], str],
) -> Version:
  """Makes the night a version: its checkpoint, then its line.

  Args:
    lineage: of the model; the newest accepted version is the parent.
    how: the night's config, written down with it.
    slept: the night.
    save: `(version, params) -> path`, returns when all is on disk; called
      for an accepted night only.
  """
  versions, parent = lineage.versions(), lineage.current()
  number = len(versions)
  accepted = slept.decision.accepted
  seconds = {f'seconds {k}': v for k, v in slept.seconds.items()}
  return lineage.add(
    Version(
      number,
      parent.version if parent else -1,
      dataclasses.asdict(how),
      slept.metrics | seconds,
      accepted,
      slept.decision.reason,
      save(number, slept.params) if accepted else '',
    )
  )
