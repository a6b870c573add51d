"""What a life of days and nights is made of, checked before it begins."""

import dataclasses
import glob
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from nestax.launch import (
  days,
  overrides,
  questions,
  quiz,
  rehearsal,
  sampling,
  studies,
)
from nestax.launch.evals import novel
from nestax.launch.trained import Trained
from nestax.models import language_model
from nestax.models.continuum import SCOPES
from nestax.sleep import grow, owners, replay, tasks
from nestax.sleep import tools as tools_
from nestax.sleep.dream import DreamConfig
from nestax.sleep.objective import SeedConfig
from nestax.sleep.reader import Said
from nestax.sleep.task import Task
from nestax.sleep.texts import TextsConfig, Words
from nestax.sleep.tools import CycleConfig, Tools

# Of what was measured with SmolLM2-135M what comes to recall: slower levels, or
# a window in which attention still sees a fact's other statements, write too
# little.
STACK = {'stack': 'groups', 'periods': ('32',), 'rate': 0.2}
EVERY_DAY = -1  # nights: one after each day, or whenever `sleep_every` says

# Nights of small models: a minute or two of a laptop.
SMALL = CycleConfig(
  seed=SeedConfig(
    steps=100, rows=8, rate=3e-3, last=0.1, keep=2.0, every=8, say=16
  ),
  texts=TextsConfig(length=64, read=32, continued=0, free=0, kept=64),
)
# Those of pretrained ones: what five nights of SmolLM2-135M were measured with
# (`evals.lives`), which learns little in the above.
LARGE = CycleConfig(
  seed=SeedConfig(
    steps=300, rows=16, rate=1e-2, last=0.05, keep=2.0, every=12, say=16
  ),
  texts=TextsConfig(length=64, read=256, continued=0, free=0, kept=128),
  # at 0.0003 a pretrained model's slot learns dreams that harm it
  dream=DreamConfig(inner_rate=1e-4, rate=1e-4),
)


@dataclasses.dataclass(frozen=True)
class Options:
  """How a life goes on; all of it may change from one call to the next.

  Attributes:
    nights: most nights ever; EVERY_DAY for no limit.
    sleep_every: tokens of the stream between nights; 0 for one after each day.
    readings: how often a day is read before its night.
    piece: tokens that are read at once.
    window: tokens that attention sees while days are read. What it still sees
      it can copy, and the levels learn little of it.
    capacity: tokens of the replay buffer, of each owner.
    surprise: what cost more when it was read is noise and is not consolidated,
      nats a token.
    disagreement: what costs the slow weights alone more contradicts them and is
      not consolidated, nats a token.
    rehearsed: rows a night of the texts to rehearse, if there are any.
    earlier: rows a night of each owner's earlier days; 0 for none, and nothing
      of a day is held when it has been slept on.
    held: tokens of earlier days that are held, of each owner.
    core_rows: texts of the core set.
    probe_rows: texts of each owner's day that retention is measured on.
    keep: checkpoints; 0 for all.
    rank: of the slots that a model without any is given.
    seed: of all that is random.
    arc: glob of ARC tasks to dream about.
    dream: file of questions, as `launch/questions.py` has them, that dreams
      about the days must help with; none of those that are asked.
    night: how a night goes.
  """

  nights: int = EVERY_DAY
  sleep_every: int = 0
  readings: int = 1
  piece: int = 128
  window: int = 2048
  capacity: int = 8192
  surprise: float = float('inf')
  disagreement: float = float('inf')
  rehearsed: int = 512
  earlier: int = 0
  held: int = 65_536
  core_rows: int = 64
  probe_rows: int = 16
  keep: int = 3
  rank: int = 8
  seed: int = 0
  arc: str = ''
  dream: str = ''
  night: CycleConfig = SMALL

  def __post_init__(self):
    for name, least in (
      ('nights', EVERY_DAY),
      ('sleep_every', 0),
      ('readings', 1),
      ('piece', 1),
      ('window', 1),
      ('capacity', 2),
      ('rehearsed', 1),
      ('earlier', 0),
      ('held', 2),
      ('core_rows', 1),
      ('probe_rows', 1),
      ('keep', 0),
      ('rank', 1),
      ('seed', 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(f'{name}={getattr(self, name)}: at least {least}')
    if self.sleep_every and self.readings > 1:
      raise ValueError(
        f'readings={self.readings} are of whole days, before their nights: '
        f'leave out sleep_every={self.sleep_every}, or read once'
      )
    for name in ('surprise', 'disagreement'):
      if not getattr(self, name) > 0:
        raise ValueError(f'{name}={getattr(self, name)}: above 0')


PRETRAINED = Options(
  readings=4, window=64, capacity=16_384, rank=32, night=LARGE
)


class Plan(NamedTuple):
  """What a life is made of, checked.

  Attributes:
    made: the model.
    days: what is read.
    core: texts of the core set.
    options: how it goes on.
    tools: the nights' programs.
    only: owners that nights are limited to; none means all.
    tasks: to dream about.
    rehearsed: texts to take some from each night; None for none.
    keep: what is slept on, besides what the options leave out: all of them say
      so of a piece of what was read.
    lessons: to dream about in the night that sleeps on their day.
    asked: questions that are put before and after every night.
  """

  made: Trained
  days: tuple[days.Day, ...]
  core: Said
  options: Options
  tools: Tools
  only: tuple[str, ...]
  tasks: tuple[Task, ...]
  rehearsed: Said | None = None
  keep: tuple[replay.Predicate, ...] = ()
  lessons: tuple[studies.Study, ...] = ()
  asked: tuple[quiz.Part, ...] = ()


def of_flags(values: Mapping) -> Plan:
  """The plan of a command line; `values` are its flags by name.

  Raises:
    ValueError, OSError, ImportError, checkpoint.CheckpointError: in words.
  """
  model = values['model']
  for name, what in (
    ('text', 'files or folders, of what the model reads'),
    ('core', 'a file, of what it may not get worse on'),
  ):
    if not values[name]:
      raise ValueError(f'--{name} is missing: give {what}')
  options = PRETRAINED if model else Options()
  every = values['sleep_every']
  options = dataclasses.replace(
    options,
    readings=1 if every else options.readings,
    nights=values['nights'],
    sleep_every=every,
  )
  options = overrides.apply(options, values['set'])
  made = novel.load(values['workdir'], model, _stack(values))
  if values['scope'] not in SCOPES:
    raise ValueError(f'--scope={values["scope"]}: one of {", ".join(SCOPES)}')
  if values['slots']:
    made = equipped(made, values['slots'], options, values['scope'])
  elif values['scope'] == 'owner' != made.model.cfg.cms.scope:
    raise ValueError(
      '--scope=owner is for slots that --slots=N gives; those of this model '
      'are shared'
    )
  elif not made.model.cfg.cms.slots:
    raise ValueError(
      'the levels of this model have no slots to grow into; give them some, '
      'such as --slots=16: an accepted night uses up two of the slowest level '
      '(one of an only level), so that 16 are for 8 nights; the next is '
      'refused, or with --set=night.full=merge folds them into the MLP first'
    )
  tokenizer = made.tokenizer
  paths = sorted(glob.glob(options.arc)) if options.arc else []
  if options.arc and not paths:
    raise FileNotFoundError(f'arc={options.arc}: there is no such file')
  # their parts go on from each other
  encode = tokenizer.encode_after
  arc = [tasks.arc(path, encode, tokenizer.bos) for path in paths]
  read = days.load(values['text'], values['days'], tokenizer)
  return prepare(
    made,
    read,
    values['core'],
    options,
    values['owners'],
    arc,
    values['rehearse'],
    asked=values['questions'],
  )


def _stack(values: Mapping) -> novel.Stack:
  """How a pretrained model's MLPs become levels; nothing for a run's model."""
  given = {name: values[name] for name in STACK if values[name] is not None}
  if values['workdir'] and not values['model']:
    for name in given:
      raise ValueError(
        f'--{name} is for the levels that a pretrained --model is given; those '
        'of a run are as they were trained'
      )
    return novel.Stack('', (), 'all', 0.0)
  how, periods, rate = (STACK | given).values()
  return novel.Stack(how, tuple(periods), 'all', rate)


def equipped(
  made: Trained, slots: int, options: Options, scope: str = 'shared'
) -> Trained:
  """The same model with slots, masked and empty, if it has none."""
  key = jax.random.key(options.seed)
  cfg, params = grow.equip(
    made.model.cfg, made.params, slots, options.rank, key, scope
  )
  model = language_model.LanguageModel(cfg)
  return made._replace(model=model, params=params)


def prepare(
  made: Trained,
  read: Sequence[days.Day],
  core: str,
  options: Options,
  only: Sequence[str] = (),
  tasks: Sequence[Task] = (),
  rehearse: Sequence[str] = (),
  keep: Sequence[replay.Predicate] = (),
  asked: str = '',
) -> Plan:
  """Checks that the model can sleep, and makes its programs.

  Args:
    made: the model.
    read: its days.
    core: path of a text that it may not get worse on.
    options: how it lives.
    only: owners that nights are limited to; none given means all.
    tasks: to dream about.
    rehearse: globs of texts of the kind that is to stay known, none of them the
      core set's.
    keep: predicates of pieces of what was read, such as
      `lambda piece: piece.owner != 'bot'`; what one refuses is not slept on.
    asked: path of a file of questions, see `questions.load`; '' for none.

  Raises:
    ValueError, OSError: in words.
  """
  unknown = sorted(set(only) - set(days.owners(read)))
  if unknown:
    names = ', '.join(days.owners(read))
    raise ValueError(f'no owner {unknown[0]!r} reads; there are {names}')
  owners.check(made.model.cfg, options.night.full)
  words = words_of(made)
  tools = tools_.of_model(made.model.cfg, options.night, words)
  core_ids = made.tokenizer.encode(sampling.read_prompt('', core, '--core'))
  length = options.night.texts.length
  if len(core_ids) < 2:
    raise ValueError(f'--core={core}: nothing to read in it')
  core_set = rows_of(core_ids, length, options.core_rows, words.pad)
  if not options.night.seed.keep and (rehearse or options.earlier):
    raise ValueError(
      'night.seed.keep=0: what is rehearsed would weigh nothing; give a weight '
      'above 0, or neither --rehearse nor earlier'
    )
  if options.earlier and options.held < length:
    raise ValueError(
      f'held={options.held} tokens of earlier days are less than one row of '
      f'night.texts.length={length}: nothing could be rehearsed'
    )
  _check_ids(made, core, core_ids)
  for day in read:
    for name, ids in day.tokens.items():
      _check_ids(made, f'day {day.name} of {name}', ids)
  rehearsed = None
  if rehearse:
    rehearsed = rehearsal.load(rehearse, core_ids, read, made.tokenizer, length)
  put = questions.load(asked, read) if asked else ()
  return Plan(
    made,
    tuple(read),
    core_set,
    options,
    tools,
    tuple(only),
    tuple(tasks),
    rehearsed,
    tuple(keep),
    _studies(made, options, read, put) if options.dream else (),
    _quiz(made, asked, put) if asked else (),
  )


def _studies(made: Trained, options: Options, read, asked):
  path = options.dream
  if made.model.cfg.cms.scope == 'owner' and len(days.owners(read)) > 1:
    raise ValueError(
      f'dream={path}: what one owner read would be dreamt about by all, whose '
      'slots are their own; leave it out, or let one read'
    )
  found = questions.load(path, read, 'dream')
  prompts = {one.prompt for one in asked}
  for one in found:
    if one.prompt in prompts:
      raise ValueError(
        f'dream={path}: {one.question!r} is asked by --questions too, which is '
        'to tell what is known: dream with other questions'
      )
  return studies.of(path, found, read, made.tokenizer, options.night.dream)


def _quiz(made: Trained, path: str, asked) -> tuple[quiz.Part, ...]:
  # a tokenizer may fill rows up with an id that the model does not have
  tokenizer = dataclasses.replace(made.tokenizer, pad=words_of(made).pad)
  parts = quiz.parts(tokenizer, asked)
  for part in parts:
    _check_ids(made, f'--questions={path}', part.sheet.rows.tokens_BxL.ravel())
  return parts


def _check_ids(made: Trained, what: str, ids) -> None:
  most = max(ids, default=0)
  if most >= made.model.cfg.V:
    raise ValueError(
      f'{what}: token {most} is none of the {made.model.cfg.V} of the model, '
      'whose tokenizer this cannot be'
    )


def words_of(made: Trained) -> Words:
  """The ids that mean something to a model's nights."""
  tokenizer, V = made.tokenizer, made.model.cfg.V
  if max(tokenizer.bos, tokenizer.eos) >= V:
    raise ValueError(
      f'the tokenizer begins and ends texts with {tokenizer.bos} and '
      f'{tokenizer.eos}; the model knows {V} ids'
    )
  allowed_V = np.zeros(V, bool)
  size = min(V, tokenizer.vocab_size)
  allowed_V[:size] = tokenizer.byte_lengths[:size] > 0
  allowed_V[tokenizer.eos] = True
  pad = tokenizer.pad if tokenizer.pad < V else tokenizer.eos
  return Words(tokenizer.bos, tokenizer.eos, pad, allowed_V)


def rows_of(ids, length: int, count: int, pad: int) -> Said:
  """At most `count` texts, evenly out of a long one, numpy."""
  tokens, size, _ = replay.batch(
    [replay.Piece('', tuple(map(int, ids)))], length, pad
  )
  tokens, size = tokens[size > 1], size[size > 1]
  chosen = np.unique(np.linspace(0, len(size) - 1, count).astype(int))
  return Said(tokens[chosen], np.ones(len(chosen), np.int32), size[chosen])
