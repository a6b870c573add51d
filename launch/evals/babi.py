"""bAbI stories, and their sentences hidden in a book, as BABILong has them."""

import glob
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nestax.launch.data.tokenizers import Tokenizer

LEAST = 10  # tokens of a sentence of the book, as in the benchmark


class Sample(NamedTuple):
  """One question, and all that was told before it."""

  facts: tuple[str, ...]
  question: str
  answer: str


def read(path) -> list[Sample]:
  """Reads a bAbI file: a sample for each of its questions.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the line that is none of bAbI's.
  """
  samples, facts = [], []
  text = pathlib.Path(path).read_text(encoding='utf-8')
  for number, line in enumerate(text.splitlines(), 1):
    if not line.strip():
      continue
    index, _, rest = line.partition(' ')
    if not index.isdigit() or not rest.strip():
      raise ValueError(
        f'{path}, line {number}: {line[:60]!r}; bAbI lines are a number and '
        'a sentence, or a number, a question, tab, answer, tab, facts'
      )
    if index == '1':
      facts = []
    question, tab, answer = rest.partition('\t')
    if not tab:
      facts.append(rest.strip())
      continue
    answer = answer.partition('\t')[0].strip()
    if not answer:
      raise ValueError(f'{path}, line {number}: a question without an answer')
    samples.append(Sample(tuple(facts), question.strip(), answer))
  if not samples:
    raise ValueError(f'{path}: no questions, so no bAbI file')
  return samples


# up to the mark before a capital letter, closing quotes included
_SENTENCE = re.compile(
  r'.+?(?:[.!?][\'"\u2019\u201d)]*(?=\s+[\'"\u2018\u201c(]*[A-Z])|$)'
)


def sentences(text: str) -> list[str]:
  """Splits prose after full stops, question and exclamation marks."""
  found = _SENTENCE.findall(' '.join(text.split()))
  return [part.strip() for part in found if part.strip()]


class Book:
  """Sentences of books as ids, read round and round."""

  def __init__(self, texts: Sequence[str], tokenizer: Tokenizer):
    made = [ids_of(tokenizer, s) for text in texts for s in sentences(text)]
    self._rows = [row for row in made if len(row) >= LEAST]
    if not self._rows:
      raise ValueError(f'the books hold no sentence of {LEAST} tokens or more')

  def take(self, rng: np.random.Generator, tokens: int) -> list[np.ndarray]:
    """As many tokens of whole sentences from a random one on, the last cut."""
    taken, left = [], tokens
    first = int(rng.integers(len(self._rows)))
    for i in itertools.count(first):
      if left <= 0:
        return taken
      row = self._rows[i % len(self._rows)][:left]
      taken.append(row)
      left -= len(row)


def ids_of(tokenizer: Tokenizer, sentence: str) -> np.ndarray:
  """A sentence's ids as they are in the middle of a text."""
  return np.array(tokenizer.encode_after(f' {sentence}'), np.int32)


def hide(
  tokenizer: Tokenizer,
  sample: Sample,
  book: Book,
  length: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Ids `[length]`: facts in order among the book's sentences.

  After a bos, if the model wants one.

  Raises:
    ValueError: if the facts alone are longer.
  """
  facts = [ids_of(tokenizer, fact) for fact in sample.facts]
  first = [tokenizer.bos] if tokenizer.adds_bos else []
  room = length - len(first)
  left = room - sum(map(len, facts))
  if left < 0:
    raise ValueError(
      f'{length} tokens: the facts of {sample.question!r} have '
      f'{room - left}; give longer contexts'
    )
  noise = book.take(rng, left)
  places = np.sort(rng.integers(len(noise) + 1, size=len(facts)))
  parts, at = [np.array(first, np.int32)], 0
  for fact, place in zip(facts, places):
    parts += [*noise[at:place], fact]
    at = place
  return np.concatenate([*parts, *noise[at:]])


def asked(question: str) -> str:
  """How a question is put; its answer begins with a space."""
  return f'\nQuestion: {question}\nAnswer:'


def right(sample: Sample, said: str, labels: Sequence[str]) -> bool:
  """Whether a written answer is right, by the benchmark's rule.

  Of what comes before the first full stop, the answer must be the only one of
  the labels that the question does not mention.
  """
  said = said.lower().partition('.')[0]
  question = sample.question.lower()
  named = {
    label
    for label in map(str.lower, labels)
    if label in said and label not in question
  }
  return named == {sample.answer.lower()}


def find(words: str, what: str) -> list[str]:
  """Paths that a glob finds, sorted.

  Raises:
    FileNotFoundError: if it finds none.
    ValueError: for no glob at all.
  """
  if not words:
    raise ValueError(f'{what} is not given: a path, or a glob such as *.txt')
  paths = sorted(glob.glob(os.path.expanduser(words)))
  if not paths:
    raise FileNotFoundError(f'{what}={words}: no such file')
  return paths


def texts(
  tokenizer: Tokenizer,
  samples: Sequence[Sample],
  book: Book,
  length: int,
  count: int,
  seed: int,
) -> Iterator[str]:
  """Makes texts to train on: context, question, answer."""
  rng = np.random.default_rng(seed)
  for i in range(count or len(samples)):
    sample = samples[i % len(samples)]
    ids = hide(tokenizer, sample, book, length, rng)
    context = tokenizer.decode(ids.tolist()).replace('\ufffd', '').strip()
    yield f'{context}{asked(sample.question)} {sample.answer}.\n'
