"""Knowledge incorporation: what is left of a passage when it is not in sight.

Passages of the user's SQuAD-type file (see `squad.read`) are read, and their
questions asked with nothing in context: exact match, F1, and, smooth where a
small model gets nothing right, the log-likelihood of the answers. 'single'
takes each passage alone, from the same model; 'continual' reads one day of
passages after another and asks all questions at the end. A line of the table
is a way to remember:

  before       nothing was read
  in context   nothing was learned; the passage stands before the question
  levels       the levels have learned as they read, and are on
  sleep        a night follows each day, levels are reset; and the other nights
               of `sleepers`: 'sleep and dreams' dreams about what follows from
               a passage, 'fine-tuning' takes as many updates on the same texts
               ('fine-tuning, replay': half of them of earlier days)

`core` is the log-likelihood a token of passages that are never read: what the
model pays for it with what it knew.

    nestax-evaluate --suite=incorporation \\
      --models='SmolLM2.gguf:stack=groups;periods=32;rate=0.2' \\
      --set=incorporation.file=squad_val.json
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from nestax.launch import plans, trained
from nestax.launch.evals import (
  learners,
  lives,
  passages,
  sleepers,
  squad,
  suite,
)
from nestax.launch.evals.passages import Answer, Held, Reading, World
from nestax.launch.evals.squad import Passage
from nestax.sleep import grow
from nestax.sleep.dream import DreamConfig
from nestax.sleep.tools import CycleConfig

TASKS = ('single', 'continual')
UNREAD = ('before', 'in context')
NIGHTS = tuple(name for name in sleepers.NAMES if name != 'no sleep')
METHODS = (*UNREAD, 'levels', *NIGHTS)


@dataclasses.dataclass(frozen=True)
class Options:
  """What is read, and how it is to be remembered.

  Attributes:
    file: SQuAD's or SEAL's, see `squad.read`.
    methods: of METHODS, a plus between them.
    single, continual: passages of these tasks, drawn anew by every seed.
    day: passages between two nights of the continual task.
    core: passages that are never read.
    tuning_rate: learning rate where MLPs are trained instead of a slot.
    rank: of the slots that nights grow into, if the model has none.
    how: days are read and questions asked.
    night: how it goes.
  """

  file: str = ''
  methods: str = (
    'before+in context+levels+sleep+fine-tuning+fine-tuning, replay'
  )
  single: int = 8
  continual: int = 8
  day: int = 1
  core: int = 16
  tuning_rate: float = 1e-4
  rank: int = 16
  how: Reading = Reading()
  night: CycleConfig = dataclasses.replace(
    lives.PRETRAINED.how, dream=DreamConfig(length=512, answer=64)
  )

  def __post_init__(self):
    for name in ('single', 'continual', 'day', 'core', 'rank'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: at least 1')
    if not 0 < self.tuning_rate < math.inf:
      raise ValueError(f'tuning_rate={self.tuning_rate}: above 0 and finite')

  def lives(
    self, task: str, chosen: Sequence[Passage]
  ) -> list[list[list[Passage]]]:
    """Days of passages that follow each other, from the same model each."""
    if task == 'single':
      return [[[passage]] for passage in chosen]
    starts = range(0, len(chosen), self.day)
    return [[list(chosen[i : i + self.day]) for i in starts]]


def cells(options: Options, asked: suite.Asked) -> Iterator[suite.Cell]:
  """A cell for each task, method and model."""
  methods = options.methods.split('+')
  for name in methods:
    if name not in METHODS:
      raise ValueError(
        f'--set=incorporation.methods={options.methods}: {name!r} is not one '
        f'of {"+".join(METHODS)}'
      )
  if not options.file:
    raise ValueError('--set=incorporation.file=FILE: passages are needed')
  for task in TASKS:
    draw(options, task, 0)  # says at once what is wrong with the file
  for word in asked.models:
    learners.parse(word)
    check = functools.partial(learners.check, word)
    for name in methods:
      for task in TASKS:
        if task == 'single' and name == 'fine-tuning, replay':
          continue  # there are no earlier days
        key = dataclasses.asdict(options) | {'method': name}
        key |= {'seeds': asked.seeds}
        del key['methods']
        run = functools.partial(
          run_cell, options, word, name, task, asked.seeds
        )
        yield suite.Cell(task, f'{name}, {word}', key, run, check)


@functools.lru_cache(1)
def _read(file: str) -> list[Passage]:
  return squad.read(file)


def draw(
  options: Options, task: str, seed: int
) -> tuple[list[Passage], list[Passage]]:
  """Passages to read, and those that are never read: the core.

  Raises:
    ValueError: if the file has too few.
  """
  found, count = _read(options.file), getattr(options, task)
  wanted = count + options.core
  if len(found) < wanted:
    raise ValueError(
      f'{options.file}: {len(found)} passages; incorporation.{task}={count} '
      f'and core={options.core} want {wanted}'
    )
  order = np.random.default_rng(seed).permutation(len(found))
  chosen = [found[i] for i in order[:wanted]]
  # the same core for both tasks
  return chosen[options.core :], chosen[: options.core]


@functools.lru_cache(1)
def _model(word: str) -> trained.Trained:
  return learners.load(word)


def ready(
  made: trained.Trained, word: str, name: str, nights: int, options: Options
) -> trained.Trained:
  """The model with what a method needs: levels that learn, slots to grow into.

  Raises:
    ValueError: if no level of it learns, and one should.
  """
  reads = name not in UNREAD and not name.startswith('fine-tuning')
  cfg = made.model.cfg
  if reads and not cfg.stream:
    raise ValueError(
      f'--models={word}: no level of this model learns; add :stack=groups to a '
      f'pretrained file, or leave {name!r} out of incorporation.methods'
    )
  if name not in sleepers.variants(options.night) or cfg.cms.slots:
    return made
  # what all other periods send goes to the slowest levels, in a slot each
  slots = nights * min(2, len(cfg.groups))
  cfg, params = grow.equip(
    cfg, made.params, slots, options.rank, jax.random.key(0)
  )
  return made._replace(model=made.model.clone(cfg=cfg), params=params)


def run_cell(
  options: Options, word: str, name: str, task: str, seeds: int, say
) -> list[dict]:
  """Reads, sleeps and asks, once a seed."""
  # days of one life follow each other; each life begins with the same model
  starts = [
    options.lives(task, draw(options, task, seed)[0]) for seed in range(seeds)
  ]
  made = ready(_model(word), word, name, max(map(len, starts[0])), options)
  sleeper = None
  if name not in UNREAD:
    sleeper = sleepers.make(
      'no sleep' if name == 'levels' else name,
      made.model.cfg,
      options.night,
      plans.words_of(made),
      options.tuning_rate,
    )
  nights = sum(len(days) for own in starts for days in own)
  rows, passed = [], 0
  for seed, own in enumerate(starts):
    rest = draw(options, task, seed)[1]
    world = passages.world(made, rest, options.night.texts.length)
    answers, cores, counted = [], [], []
    for days in own:
      held = _learned(options, world, sleeper, days, seed)
      chosen = [passage for day in days for passage in day]
      shown = name == 'in context'
      answers += passages.ask(world, options.how, held, chosen, shown)
      cores.append(passages.core(world, held))
      counted += held.nights
      passed += len(days)
      say(passed, nights)
    row = _row(answers, float(np.mean(cores)))
    rows.append({'seed': seed} | row | {'nights': counted})
  return rows


def _learned(options: Options, world: World, sleeper, days, seed: int) -> Held:
  if sleeper is None:
    return Held(world.made.params)
  return passages.learn(world, options.how, sleeper, options.night, days, seed)


def _row(answers: list[list[Answer]], core: float) -> dict:
  """The scores over all questions, those of each passage, some answers."""

  def mean(some: Sequence[Answer]) -> dict[str, float]:
    return {
      'exact': 100 * float(np.mean([one.exact for one in some])),
      'F1': 100 * float(np.mean([one.f1 for one in some])),
      'log-likelihood': float(np.mean([one.log for one in some])),
    }

  every = [one for some in answers for one in some]
  return {
    'scores': mean(every) | {'core': core},
    'questions': len(every),
    'passages': [mean(some) for some in answers],
    'said': [one.said for one in every[:8]],
  }


def _graded(single: float, continual: float) -> dict[str, float]:
  return {'single exact': single, 'continual exact': continual}


EVALUATION = suite.Evaluation(
  name='incorporation',
  options=Options(),
  cells=cells,
  words='Exact match and F1 of answers with no passage in context, %; '
  'log-likelihood of the right answers and of passages that are never read '
  '(core), nats a token, nearer to 0 is better. The papers asked Qwen-2.5-7B, '
  'one or 200 passages, and had GPT-4.1 grade answers: not the same as exact.',
  paper={
    'base model, graded': _graded(31.9, 31.9),
    'fine-tuned, graded': _graded(33.4, 32.0),
    'SEAL, graded': _graded(46.7, 43.2),
    'Sleep of two levels, graded': _graded(48.1, 44.3),
    'Sleep of four levels, graded': _graded(48.9, 46.2),
    'the same without dreaming, graded': _graded(35.7, 36.2),
  },
  source='Sleep, Table 3',
  decimals=2,
  mixed=True,
)
