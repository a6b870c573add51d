"""Rows with needles in a haystack: what is hidden, where, and what is asked.

The kinds and sentences are RULER's (Hsieh et al. 2024, 'RULER: What's the Real
Context Size of Your Long-Context Language Models?'): a key is an adjective and
a noun, a value a number of seven digits or a UUID; 'noise' repeats five
sentences, 'text' is any text, here generated unless a file is given.
"""

import dataclasses
import hashlib
import re
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nestax.launch.data.tokenizers import Tokenizer

PROMPTS = ('ruler', 'short')
NOISE = (
  'The grass is green.',
  'The sky is blue.',
  'The sun is yellow.',
  'Here we go.',
  'There and back again.',
)
ADJECTIVES = (
  'amber ancient brave brisk calm clever crimson curious dusty eager early '
  'faint fierce gentle golden hollow humble icy jolly keen lazy lively mellow '
  'narrow noble odd pale plain proud quiet rapid rusty shy silent sleepy stark '
  'steady tidy vivid wild'
).split()
NOUNS = (
  'anchor apple arrow badge barrel beacon bell bridge candle canyon castle '
  'cedar cloud compass desert engine falcon feather forest garden hammer '
  'harbor island kettle ladder lantern meadow mirror mountain needle orchard '
  'pebble river saddle shadow spoon tower valley violin window'
).split()
VERBS = (
  'carries crosses finds follows guards hides leaves meets passes reaches sees '
  'touches'
).split()


class Kind(NamedTuple):
  """How many needles there are; each key has `values` values."""

  keys: int = 1
  values: int = 1  # of every key
  asked: int = 1  # keys that are asked for
  value: str = 'numbers'  # or uuids
  haystack: str = 'text'  # or noise


KINDS = {
  'S-NIAH-1': Kind(haystack='noise'),
  'S-NIAH-2': Kind(),
  'S-NIAH-3': Kind(value='uuids'),
  'MK-NIAH-1': Kind(keys=4),
  'MQ-NIAH': Kind(keys=4, asked=4),
  'MV-NIAH': Kind(values=4),
}
MOST = 4  # values that are asked for at once


class Row(NamedTuple):
  """One question with its answer.

  Attributes:
    tokens: ids, the answer included.
    span: of every token 0, or the number from 1 of the value it is part of.
    answer: where the answer begins.
    values: what has to be said; those of a key in the order in which they
      stand in the row, so that there is one right answer.
  """

  tokens: np.ndarray
  span: np.ndarray
  answer: int
  values: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Haystack:
  """Sentences as ids, and what words are put as.

  Attributes:
    sentences: of a text, each with the space before it.
    noise: the same of `NOISE`.
    encode: text to ids, of what a row begins with.
    after: the same of what goes on from it.
    begin: what a row begins with.
    prompt: 'ruler', or 'short' without the words before the haystack.
  """

  sentences: Sequence[list[int]]
  noise: Sequence[list[int]]
  encode: Callable[[str], list[int]]
  after: Callable[[str], list[int]]
  begin: list[int]
  prompt: str = 'ruler'

  @property
  def more(self) -> str:
    """What to give where a row has no room."""
    return 'more' if self.prompt == 'short' else "more, or prompt='short'"


def make(tokenizer: Tokenizer, text: str = '', prompt: str = 'ruler'):
  """The haystack of a text, or of generated sentences if there is none.

  Raises:
    ValueError: for another prompt.
  """
  if prompt not in PROMPTS:
    raise ValueError(f'prompt={prompt!r}: one of {", ".join(PROMPTS)}')
  sentences = split(text) if text else generated(2000)
  after = tokenizer.encode_after
  spaced = [after(' ' + sentence) for sentence in sentences]
  noise = [after(' ' + sentence) for sentence in NOISE]
  begin = [tokenizer.bos] if tokenizer.adds_bos else []
  return Haystack(spaced, noise, tokenizer.encode, after, begin, prompt)


def split(text: str) -> list[str]:
  """Sentences of a text, its white space evened out."""
  sentences = re.split(r'(?<=[.!?])\s+', ' '.join(text.split()))
  return [sentence for sentence in sentences if sentence]


def generated(many: int) -> list[str]:
  """Sentences of the words that keys are made of, always the same."""
  rng = np.random.default_rng(0)

  def pick(words):
    return words[rng.integers(len(words))]

  def thing():
    return f'the {pick(ADJECTIVES)} {pick(NOUNS)}'

  return [
    f'{thing()} {pick(VERBS)} {thing()}.'.capitalize() for _ in range(many)
  ]


def digest(text: str) -> str:
  """A short name of a text, for the keys of cells."""
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class _Question(NamedTuple):
  """What a row is made of beside the haystack."""

  head: list[int]
  needles: list[list[int]]  # in the order in which they will stand
  tail: list[int]
  answer: list[int]
  span: list[int]  # of the answer
  values: list[str]

  @property
  def taken(self) -> int:
    parts = self.head, *self.needles, self.tail, self.answer
    return sum(map(len, parts))


def taken(hay: Haystack, kind: Kind, rng: np.random.Generator) -> int:
  """Draws a question; gives the tokens it takes without any haystack."""
  return _question(hay, kind, rng).taken


def most(hay: Haystack) -> dict[str, int]:
  """Tokens that a question takes at most, without any haystack, by its kind.

  Of a tokenizer of bytes none takes more; of others hardly any does, as the
  longest words there are do not always make the longest question.
  """
  rng = np.random.default_rng(0)

  def size(word):
    return len(hay.after(' ' + word))

  keys = [f'{a}-{n}' for a in ADJECTIVES for n in NOUNS]
  keys = sorted(keys, key=size, reverse=True)
  found = {}
  for name, kind in KINDS.items():
    value = max((_value(rng, kind.value) for _ in range(64)), key=size)
    needles = [
      (k, value) for k in keys[: kind.keys] for _ in range(kind.values)
    ]
    found[name] = _laid(hay, kind, keys[: kind.keys], needles).taken
  return found


def row(hay: Haystack, kind: Kind, L: int, rng: np.random.Generator) -> Row:
  """Draws needles and lays a row of at most L tokens around them.

  The haystack is cut at a sentence's end; needles are at any sentence.

  Raises:
    ValueError: if L has no room for the question and its needles.
  """
  made = _question(hay, kind, rng)
  if made.taken > L:
    raise ValueError(
      f'a row of {L} tokens: question, needles and answer alone take '
      f'{made.taken}; give {hay.more}'
    )
  context = _context(hay, kind, L - made.taken, made.needles, rng)
  tokens = np.array(made.head + context + made.tail + made.answer, np.int32)
  start = len(tokens) - len(made.answer)
  span = np.array([0] * start + made.span, np.int32)
  return Row(tokens, span, start, made.values)


def _question(hay: Haystack, kind: Kind, rng) -> _Question:
  keys = _keys(rng, kind.keys)
  needles = [
    (key, _value(rng, kind.value)) for key in keys for _ in range(kind.values)
  ]
  needles = [needles[i] for i in rng.permutation(len(needles))]
  return _laid(hay, kind, keys, needles)


def _laid(hay: Haystack, kind: Kind, keys: list[str], needles) -> _Question:
  """The question whose needles, (key, value) each, stand in this order."""
  asked = keys[: kind.asked]
  # values of a key are said in the order in which they stand
  values = [v for key in asked for other, v in needles if other == key]
  after = hay.after
  first, last = _words(hay.prompt, kind.value, asked, len(values) == 1)
  answer, span = _answer(after, values)
  return _Question(
    hay.begin + (hay.encode(first) if first else []),
    [
      after(f' One of the special magic {kind.value} for {key} is: {value}.')
      for key, value in needles
    ],
    after(last),
    answer,
    span,
    values,
  )


def _keys(rng, many: int) -> list[str]:
  chosen = rng.choice(len(ADJECTIVES) * len(NOUNS), many, replace=False)
  pairs = [divmod(int(i), len(NOUNS)) for i in chosen]
  return [f'{ADJECTIVES[a]}-{NOUNS[n]}' for a, n in pairs]


def _value(rng, what: str) -> str:
  if what == 'uuids':
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
  return str(rng.integers(10**6, 10**7))


def _words(prompt: str, what: str, asked: list[str], one: bool):
  """Before the haystack, and after it; RULER's, or no more than is needed."""
  query = ', '.join(asked[:-1]) + ', and ' * (len(asked) > 1) + asked[-1]
  single = what.removesuffix('s')
  if prompt == 'short':
    return '', f'\nThe special magic {what} for {query}:'
  if one:
    return (
      f'A special magic {single} is hidden within the following text. Make '
      f'sure to memorize it. I will quiz you about the {single} afterwards.\n',
      f'\nWhat is the special magic {single} for {query} mentioned in the '
      f'provided text? The special magic {single} for {query} mentioned in the '
      'provided text is',
    )
  return (
    f'Some special magic {what} are hidden within the following text. Make '
    f'sure to memorize it. I will quiz you about the {what} afterwards.\n',
    f'\nWhat are all the special magic {what} for {query} mentioned in the '
    f'provided text? The special magic {what} for {query} mentioned in the '
    'provided text are',
  )


def _answer(encode, values: list[str]) -> tuple[list[int], list[int]]:
  """Ids of all values, commas between, and which value each is part of."""
  tokens, span = [], []
  for i, value in enumerate(values):
    if i:
      comma = encode(',')
      tokens += comma
      span += [0] * len(comma)
    said = encode(' ' + value)
    tokens += said
    span += [i + 1] * len(said)
  return tokens, span


def _context(hay, kind, room: int, needles, rng) -> list[int]:
  """Sentences up to the room there is, and the needles among them in order."""
  sentences = hay.noise if kind.haystack == 'noise' else hay.sentences
  at = 0 if kind.haystack == 'noise' else int(rng.integers(len(sentences)))
  chosen = []
  while len(sentences[at % len(sentences)]) <= room:
    sentence = sentences[at % len(sentences)]
    chosen.append(sentence)
    room -= len(sentence)
    at += 1
  places = np.sort(rng.integers(0, len(chosen) + 1, len(needles)))
  for place, needle in zip(places[::-1], needles[::-1]):
    chosen.insert(place, needle)
  return [token for sentence in chosen for token in sentence]
