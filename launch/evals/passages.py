"""A model reads passages, spends nights on them, and is asked without them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nestax.launch import plans, trained
from nestax.launch.evals import asking, babi, contexts, squad, writing
from nestax.launch.evals.sleepers import Evening, Sleeper
from nestax.launch.evals.squad import Passage, Question
from nestax.sleep import gate, replay, texts
from nestax.sleep import reader as readers
from nestax.sleep.dream import DreamConfig
from nestax.sleep.reader import Said
from nestax.sleep.task import TaskError
from nestax.sleep.texts import Day, TextsConfig, Words
from nestax.sleep.tools import CycleConfig

# What SEAL (arXiv 2506.10943) asks a model to write about a passage.
IMPLY = (
  "Let's read the following passage and produce a list of implications derived "
  'directly or indirectly from the content.\n\nPassage:\n'
)
IMPLIED = '\n\nImplications:\n'


@dataclasses.dataclass(frozen=True)
class Reading:
  """How passages are read and asked about.

  Attributes:
    passes: how often a day states each of its passages.
    window: tokens that attention sees as it reads; few, so that a passage is
      not just copied from when it was read last.
    piece: tokens a call, made up to whole periods of all levels.
    questions: of a passage, the first ones; 0 for all.
    most: tokens of an answer.
    rows: prompts at a time.
    past: texts of earlier days that a night may keep, or replay, at most.
  """

  passes: int = 32
  window: int = 64
  piece: int = 256
  questions: int = 0
  most: int = 16
  rows: int = 16
  past: int = 384

  def __post_init__(self):
    for name in ('passes', 'window', 'piece', 'most', 'rows'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: at least 1')
    for name in ('questions', 'past'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)}: 0 or more')


class World(NamedTuple):
  """The model as it is before it has read anything."""

  made: trained.Trained
  words: Words
  core: Said  # texts that it is to stay as good at


class Held(NamedTuple):
  """What answers come from.

  Attributes:
    params: weights.
    context: what levels have written, or None.
    nights: what each night counted, and its seconds by phase.
  """

  params: dict
  context: Any = None
  nights: tuple[dict, ...] = ()


class Answer(NamedTuple):
  """What came of one question."""

  exact: float
  f1: float
  log: float  # nats a token of the likeliest of the right answers
  said: str


def first(made: trained.Trained) -> list[int]:
  """What a text begins with."""
  return [made.tokenizer.bos] if made.tokenizer.adds_bos else []


def text(passage: Passage) -> str:
  """A passage as it is read."""
  return f'{passage.title}\n{passage.text}'.strip()


def put(question: str) -> str:
  """A question, before its answer."""
  return f'Question: {question}\nAnswer:'


def world(
  made: trained.Trained, passages: Sequence[Passage], length: int
) -> World:
  """The model with a core set: the beginnings of passages it never reads."""
  words = plans.words_of(made)
  rows = [first(made) + made.tokenizer.encode(text(p)) for p in passages]
  rows = [row[:length] for row in rows]
  tokens, count = asking.padded(rows, len(rows), length)
  return World(made, words, Said(tokens, np.ones_like(count), count))


def day_ids(
  made: trained.Trained, day: Sequence[Passage], passes: int, rng
) -> np.ndarray:
  """All that is read in a day; its passages in another order every time."""
  parts = []
  for _ in range(passes):
    parts += [text(day[i]) for i in rng.permutation(len(day))]
  ids = first(made) + made.tokenizer.encode('\n\n'.join(parts) + '\n\n')
  return np.array(ids, np.int32)


@dataclasses.dataclass(frozen=True)
class Implications:
  """A task to dream about: what follows from a passage.

  A dream is good if it helps to end the passage's own sentences; nothing of
  the questions that are asked later is in it.
  """

  passage: Passage
  made: trained.Trained
  cfg: DreamConfig

  @property
  def name(self) -> str:
    return self.passage.title

  def context(self) -> list[int]:
    on = self.made.tokenizer.encode_after
    before = first(self.made) + self.made.tokenizer.encode(IMPLY)
    after = on(IMPLIED)
    # a quarter of the row at least is for the dream
    room = self.cfg.length - self.cfg.length // 4 - len(before) - len(after)
    if room < 1:
      raise TaskError(
        f'dream.length={self.cfg.length}: no room for a passage behind '
        f'{len(before) + len(after)} tokens of what is asked; give more'
      )
    return [*before, *on(self.passage.text)[:room], *after]

  def questions(self) -> list[tuple[list[int], list[int]]]:
    tokenizer, pairs = self.made.tokenizer, []
    half = self.cfg.answer // 2
    sentences = babi.sentences(self.passage.text)
    for words in (sentence.split() for sentence in sentences):
      middle = (len(words) + 1) // 2
      if middle < len(words):
        start = tokenizer.encode(' '.join(words[:middle]))
        start = first(self.made) + start
        end = tokenizer.encode_after(' ' + ' '.join(words[middle:]))
        pairs.append((start[-half:], end[:half]))
    if not pairs:
      raise TaskError(
        f'{self.name!r}: no sentence of two words or more to dream about'
      )
    return pairs


def learn(
  world: World,
  how: Reading,
  sleeper: Sleeper,
  night: CycleConfig,
  days: Sequence[Sequence[Passage]],
  seed: int,
  say: Callable[[int], None] = lambda done: None,
) -> Held:
  """Goes through days and nights.

  Args:
    world: where it begins.
    how: days are read.
    sleeper: how nights are spent.
    night: what the sleeper was made with.
    days: the passages of each.
    seed: of all that is random.
    say: told the number of nights that have passed.
  """
  made, cfg, rng = world.made, world.made.model.cfg, np.random.default_rng(seed)
  params, state, past, nights = made.params, None, [], []
  for number, day in enumerate(days, 1):
    ids = day_ids(made, day, how.passes, rng)
    if sleeper.reads:
      state = _read(cfg, params, state, ids, how)
    read = _gathered(night.texts, world.words.pad, ids)
    evening = Evening(
      params,
      state,
      read,
      _past(past, how.past, (seed, number)),
      world.core,
      tuple(Implications(passage, made, night.dream) for passage in day),
      number,
      jax.random.key(seed),
    )
    params, numbers, seconds = sleeper.night(evening)
    numbers = {name: float(x) for name, x in numbers.items()}
    nights.append({'numbers': numbers, 'seconds': seconds})
    past.append(read.read[0])
    state = None if sleeper.resets else state
    say(number)
  context = None if state is None else readers.learned(state)
  return Held(params, context, tuple(nights))


def _past(days: Sequence[Said], count: int, seed) -> Said | None:
  """Rows of earlier days, always as many; None if there are none."""
  return texts.joined(texts.earlier(days, count, np.random.default_rng(seed)))


def _read(cfg, params, state, ids, how: Reading):
  """Reads a day in whole calls, so that nothing waits to be learned."""
  period = cfg.stream.periods[-1]
  piece = -(-how.piece // period) * period
  # the beginning of the day once more fills the last call
  row = np.resize(ids, -(-len(ids) // piece) * piece)[None]
  return contexts.read(cfg, params, row, how.window, piece, state)


def _gathered(how: TextsConfig, pad: int, ids: np.ndarray) -> Day:
  buffer = replay.Replay(len(ids))
  buffer.add(replay.Piece('reader', tuple(map(int, ids))))
  return texts.gather(how, pad, ['reader'], buffer)


def ask(
  world: World,
  how: Reading,
  held: Held,
  passages: Sequence[Passage],
  shown: bool = False,
) -> list[list[Answer]]:
  """Asks the questions of each passage, with nothing in context.

  Args:
    world: whose model it is.
    how: questions are asked.
    held: what answers come from.
    passages: whose questions.
    shown: the passage stands before each of its questions.
  """
  made = world.made
  asked = asking.Asked(
    made.model.cfg, held.params, how.rows, context=held.context
  )
  todo = [
    (passage, question)
    for passage in passages
    for question in passage.questions[: how.questions or None]
  ]
  prompts = [
    first(made)
    + made.tokenizer.encode(
      (f'{text(passage)}\n\n' if shown else '') + put(question.text)
    )
    for passage, question in todo
  ]
  said = writing.write(asked, made.tokenizer, prompts, how.most, ['\n'])
  logs = _logs(asked, made, prompts, [question for _, question in todo])
  answers = iter(
    Answer(
      squad.exact(words, question.answers),
      squad.f1(words, question.answers),
      log,
      words.strip(),
    )
    for (_, question), words, log in zip(todo, said, logs)
  )
  return [
    [next(answers) for _ in passage.questions[: how.questions or None]]
    for passage in passages
  ]


def _logs(asked, made, prompts, questions: Sequence[Question]) -> list[float]:
  """Nats a token of the likeliest right answer to each question."""
  pairs, sizes = [], []
  for prompt, question in zip(prompts, questions):
    rows = [
      made.tokenizer.encode_after(f' {answer}') for answer in question.answers
    ]
    pairs += [(prompt, row) for row in rows]
    sizes.append(len(rows))
  scores = iter(asking.score(asked, pairs))
  lengths = iter(len(answer) for _, answer in pairs)
  return [
    max(next(scores).log / next(lengths) for _ in range(size)) for size in sizes
  ]


def core(world: World, held: Held) -> float:
  """Nats a token of the core set, with their sign: less than 0."""
  cfg, (tokens, _, count) = world.made.model.cfg, world.core
  reader = readers.of_model(cfg)
  return -gate.loss(reader, held.params, held.context, tokens, count)
