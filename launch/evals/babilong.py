"""BABILong: a bAbI story's sentences hidden in a book, a question at the end.

Kuratov et al., arXiv 2406.10149, from the user's own files: facts keep their
order and stand between random sentences of the book; a context has a fixed
number of tokens, up to millions, and is read as a stream in constant memory.
The answer is one of the words that answer any question of the file.

    nestax-evaluate --suite=babilong --models=runs/mine \\
      --set='babilong.babi=babi/qa1_*_test.txt' \\
      --set='babilong.books=books/*.txt' --set=babilong.lengths=4096+1048576

The papers' small models are tuned on such texts; these are made by

    python -m nestax.launch.evals.babilong --babi='babi/qa1_*_train.txt' \\
      --books='books/*.txt' --tokenizer=bytes --length=4096 --out=train.jsonl

for `nestax-train --config.data.source=jsonl --config.data.path=train.jsonl`.
"""

import dataclasses
import functools
import json
import pathlib
import re
import sys
from collections.abc import Iterator

import numpy as np
from absl import app, flags

from nestax.launch import command, trained
from nestax.launch.data import tokenizers
from nestax.launch.data.tokenizers import Tokenizer
from nestax.launch.evals import asking, babi, contexts, learners, suite, writing


@dataclasses.dataclass(frozen=True)
class Options:
  """How contexts are made and read.

  Attributes:
    babi: files of bAbI, a glob.
    books: files to hide them in, a glob.
    lengths: tokens of the contexts, a plus between them.
    samples: questions of each file, the first ones; 0 for all.
    window: tokens that attention sees.
    piece: tokens a call.
    rows: contexts side by side.
    most: tokens of a written answer.
  """

  babi: str = ''
  books: str = ''
  lengths: str = '4096+16384+65536'
  samples: int = 100
  window: int = 2048
  piece: int = 1024
  rows: int = 4
  most: int = 12


@functools.lru_cache(1)
def library(tokenizer: Tokenizer, words: str) -> babi.Book:
  """The book of all files that a glob finds."""
  texts = [
    pathlib.Path(path).read_text(encoding='utf-8')
    for path in babi.find(words, 'books')
  ]
  return babi.Book(texts, tokenizer)


@functools.lru_cache(1)
def _model(word: str) -> trained.Trained:
  return learners.load(word)


def cells(options: Options, asked: suite.Asked) -> Iterator[suite.Cell]:
  """A cell for each model, length and file."""
  lengths = learners.numbers(options.lengths, 'lengths')
  paths = babi.find(options.babi, '--set=babilong.babi')
  babi.find(options.books, '--set=babilong.books')
  for word in asked.models:
    learners.parse(word)
    check = functools.partial(learners.check, word)
    for length in lengths:
      for path in paths:
        key = dataclasses.asdict(options) | {'file': path, 'length': length}
        del key['babi'], key['lengths']
        run = functools.partial(run_cell, options, word, path, length)
        run = functools.partial(run, asked.seeds)
        yield suite.Cell(f'{_name(path)} {length}', word, key, run, check)


def _name(path: str) -> str:
  stem = pathlib.Path(path).stem
  number = re.match(r'qa\d+', stem)
  return number[0] if number else stem


def run_cell(
  options: Options, word: str, path: str, length: int, seeds: int, say
) -> list[dict]:
  """Reads every context and asks; a row for each placement of the facts."""
  made, samples = _model(word), babi.read(path)
  labels = sorted({sample.answer for sample in samples})
  samples = samples[: options.samples or None]
  book, rows = library(made.tokenizer, options.books), []
  for seed in range(seeds):
    rng, chosen, said = np.random.default_rng(seed), 0, 0
    for at in range(0, len(samples), options.rows):
      part = samples[at : at + options.rows]
      ids = [babi.hide(made.tokenizer, s, book, length, rng) for s in part]
      state = contexts.read(
        made.model.cfg,
        made.params,
        np.stack(ids + ids[:1] * (options.rows - len(ids))),
        options.window,
        options.piece,
      )
      for i, sample in enumerate(part):
        begun = contexts.row(state, i)
        picked, text = answer(made, begun, sample, labels, options.most)
        chosen += picked == sample.answer
        said += babi.right(sample, text, labels)
      say(seed * len(samples) + at + len(part), seeds * len(samples))
    of = len(samples) / 100
    scores = {'chosen': chosen / of, 'written': said / of}
    rows.append({'seed': seed, 'scores': scores, 'chance': 100 / len(labels)})
  return rows


def answer(
  made: trained.Trained, begun, sample: babi.Sample, labels, most: int
) -> tuple[str, str]:
  """The label that the model likes best, and what it writes itself."""
  encode = made.tokenizer.encode_after
  asked = asking.Asked(made.model.cfg, made.params, len(labels), begun)
  prompt = encode(babi.asked(sample.question))
  pairs = [(prompt, encode(f' {label}')) for label in labels]
  logs = [score.log for score in asking.score(asked, pairs)]
  one = dataclasses.replace(asked, rows=1)
  (text,) = writing.write(one, made.tokenizer, [prompt], most, ['\n'])
  return labels[int(np.argmax(logs))], text


EVALUATION = suite.Evaluation(
  name='babilong',
  options=Options(),
  cells=cells,
  words='Share of questions answered rightly, %: the likeliest of the words '
  'that answer any question of the file, and what is written.',
  paper={},
  source='',
)

FLAGS = flags.FlagValues()
_BABI = flags.DEFINE_string(
  'babi', '',
  'Files of bAbI tasks to take the stories from, a glob.',
  flag_values=FLAGS,
)  # fmt: skip
_BOOKS = flags.DEFINE_string(
  'books', '', 'Text files to hide the stories in, a glob.', flag_values=FLAGS
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', 'bytes',
  'Tokenizer that lengths are counted in: bytes, or its file.',
  flag_values=FLAGS,
)  # fmt: skip
_LENGTH = flags.DEFINE_integer(
  'length', 4096,
  'Tokens of each text that is made.',
  lower_bound=2, flag_values=FLAGS,
)  # fmt: skip
_COUNT = flags.DEFINE_integer(
  'count', 0,
  'How many texts to make; 0: one for each question.',
  lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_SEED = flags.DEFINE_integer(
  'seed', 0,
  'Seed of the draws, such as of where facts stand.',
  flag_values=FLAGS,
)  # fmt: skip
_OUT = flags.DEFINE_string(
  'out', 'train.jsonl',
  'JSON-lines file to write the texts to.',
  flag_values=FLAGS,
)  # fmt: skip


def main(argv: list[str]) -> int:
  """Writes JSON lines to train on; returns 0, or 2 for what is not there."""
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    tokenizer = tokenizers.load(_TOKENIZER.value)
    samples = [
      s for path in babi.find(_BABI.value, '--babi') for s in babi.read(path)
    ]
    book = library(tokenizer, _BOOKS.value)
    numbers = _LENGTH.value, _COUNT.value, _SEED.value
    with open(_OUT.value, 'w', encoding='utf-8') as file:
      for text in babi.texts(tokenizer, samples, book, *numbers):
        file.write(json.dumps({'text': text}) + '\n')
  except (ValueError, OSError) as error:
    print(f'babilong: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  app.run(main, flags_parser=command.parser('babilong', __doc__, FLAGS))
