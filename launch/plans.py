"""What a life of days and nights is made of, checked before it begins."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from nestax.launch import (
  days,
  questions,
  quiz,
  rehearsal,
  sampling,
  studies,
)
from nestax.launch.sleep_options import Options
from nestax.launch.trained import Trained
from nestax.models import language_model
from nestax.sleep import grow, owners, replay
from nestax.sleep import tools as tools_
from nestax.sleep.reader import Said
from nestax.sleep.task import Task
from nestax.sleep.texts import Words
from nestax.sleep.tools import Tools


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
  days.check_names([day.name for day in read], 'days')
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
