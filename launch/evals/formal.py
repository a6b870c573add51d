"""Formal languages: parity, (aa)*, (abab)*, a^n b^n, a^n b^n c^n, shuffle-2.

As in Irie et al. 2023 ('Practical Computational Power of Linear Transformers
and Their Recurrent and Self-Referential Extensions', EMNLP) on the languages of
Bhattamishra et al. 2020 ('On the Ability and Limitations of Transformers to
Recognize Formal Languages', EMNLP): at every symbol of a string of the language
the model says which symbols may come next, or that the string may end here;
each such set is one class. A string counts only if every prediction is right.

- parity: an even number of 1s. Both bits may always follow; the prefix may end
  or not. Lengths geometric with mean about the middle of the bin, cut at its
  end; a string with an odd number of 1s gets one more.
- (aa)*, (abab)*: prefixes that may end, or not. A bin holds each string once.
- a^n b^n, a^n b^n c^n: a or b; b; c; or the end. `n` uniform.
- shuffle-2: two kinds of brackets, each balanced by itself, merged at random;
  which of the two closing brackets may follow (whether the string may end
  follows from that). Half the length is uniform, kinds by coin, words and merge
  uniform; the original's grammar only gives nested ones.

Bin 0 has lengths of training (2 to 50; n of 1 to 50), bin 1 longer ones (to
100; 51 to 100). Training 10,000 strings. Who counts to 50 may count to 100 at
one step and not at the next, so a run is scored where it was best on other
strings of both bins. Of (aa)*, (abab)*, a^n b^n and a^n b^n c^n there are 12 to
50 strings in a bin: those of every language are shared out by a hash of the
string, about half of them to tell the best evaluation by, the others to test.

Hope's memory is given another rule for the languages that want a counter than
for those that want a state of few values (`COUNTS`, `TRACKS`): no rule tried
did both.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from nestax.launch.evals import problems, suite, trainable, trials

Text = tuple[list[int], list[int]]  # symbols, and the class after each


@dataclasses.dataclass(frozen=True)
class Options:
  """Lengths in symbols, of a^n b^n and a^n b^n c^n in n.

  Attributes:
    longest: of training and bin 0.
    beyond: longest of bin 1.
    train: how models are trained.
  """

  longest: int = 50
  beyond: int = 100
  train: trials.Training = trials.Training(
    D=64,
    N=2,
    H=4,
    steps=3000,
    batch=64,
    examples=10_000,
    tests=2000,
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    decay=0.0,
    evaluations=24,
    best='valid',
  )

  def __post_init__(self):
    if not 4 <= self.longest < self.beyond - 3:
      raise ValueError(
        f'longest={self.longest}, beyond={self.beyond}: at least 4 symbols, '
        'and 4 more beyond'
      )


def parity(rng: np.random.Generator, low: int, high: int) -> Text | None:
  """Bits with an even number of ones; the class is 1 where they are even."""
  mean = (low + high) // 2
  length = min(int(rng.geometric(1 / (1 + mean))) - 1, high)
  bits = rng.integers(0, 2, length)
  if bits.sum() % 2:
    bits = np.append(bits, 1)
  if not low <= len(bits) <= high:
    return None
  return list(bits), list(1 - np.cumsum(bits) % 2)


def repeated(word: str, rng, low: int, high: int) -> Text | None:
  """A word again and again; the class is 1 where it has just ended."""
  period = len(word)
  times = int(rng.integers(low, high + 1)) // period
  if times * period < max(low, 1):
    return None
  symbols = [ord(c) - ord('a') for c in word] * times
  return symbols, ([0] * (period - 1) + [1]) * times


def counted(letters: int, rng, low: int, high: int) -> Text:
  """n of each letter; classes: a or b, then the next letter, then the end."""
  n = int(rng.integers(low, high + 1))
  symbols = np.repeat(np.arange(letters), n)
  classes = np.concatenate([np.zeros(n, int), *_runs(letters, n)])
  return list(symbols), list(classes)


def _runs(letters: int, n: int) -> list[np.ndarray]:
  """After letter i > 0: the letter i for n - 1 times, then the next or end."""
  runs = []
  for letter in range(1, letters):
    runs.append(np.append(np.full(n - 1, letter), letter + 1))
  return runs


def shuffled(rng: np.random.Generator, low: int, high: int) -> Text:
  """Two kinds of brackets; the class says which of them may be closed."""
  pairs = int(rng.integers(-(-low // 2), high // 2 + 1))
  first = int(rng.binomial(pairs, 0.5))
  words = [_balanced(rng, first), _balanced(rng, pairs - first)]
  kind = rng.permutation(np.repeat([0, 1], [2 * first, 2 * (pairs - first)]))
  step = np.zeros(2 * pairs, int)
  for i, word in enumerate(words):
    step[kind == i] = word
  depth = np.stack([np.cumsum(step * (kind == i)) for i in (0, 1)])
  symbols = 2 * kind + (step < 0)
  return list(symbols), list((depth > 0).T @ np.array([1, 2]))


def _balanced(rng: np.random.Generator, pairs: int) -> np.ndarray:
  """A balanced word of `pairs` ups (1) and downs (-1), all equally likely."""
  steps = rng.permutation(np.repeat([1, -1], [pairs, pairs + 1]))
  # Of its rotations one stays above zero until its last step (cycle lemma).
  start = int(np.argmin(np.cumsum(steps))) + 1
  return np.roll(steps, -start)[:-1]


class Language(NamedTuple):
  """How strings are drawn, `(rng, low, high) -> Text`; None is drawn again."""

  draw: Callable
  V: int  # symbols or classes, whichever are more
  letters: int = 0  # of a^n b^n and the like, whose lengths are of n
  counts: bool = False  # whether it takes a counter without bound


LANGUAGES = {
  'parity': Language(parity, 2),
  '(aa)*': Language(functools.partial(repeated, 'aa'), 2),
  '(abab)*': Language(functools.partial(repeated, 'abab'), 2),
  'a^n b^n': Language(functools.partial(counted, 2), 3, 2, True),
  'a^n b^n c^n': Language(functools.partial(counted, 3), 4, 3, True),
  'shuffle-2': Language(shuffled, 4, counts=True),
}
TRIES = 50  # draws for every string wanted, before a bin is held to be empty


def half(symbols: list[int]) -> int:
  """Which half of its language a string is of, 0 or 1, whoever draws it."""
  return hashlib.sha256(bytes(map(int, symbols))).digest()[0] & 1


def strings(
  language: Language,
  low: int,
  high: int,
  distinct: bool,
  width: int = 0,
  of_half: int | None = None,
) -> problems.Draw:
  """Rows of strings of `low` to `high` symbols (or n), padded to the longest.

  With `distinct` each string once, and fewer of them if there are no more.
  With `width` padded as if that were `high`. With `of_half` of that `half` of
  the language only.
  """

  def draw(rng: np.random.Generator, rows: int) -> problems.Batch:
    found = {}
    for number in range(TRIES * rows):
      text = language.draw(rng, low, high)
      if text is not None and of_half in (None, half(text[0])):
        key = tuple(text[0]) if distinct else number
        found.setdefault(key, text)
      if len(found) == rows:
        break
    texts = list(found.values())
    shape = len(texts), (width or high) * max(1, language.letters)
    made = {name: np.zeros(shape, np.int32) for name in ('tokens', 'targets')}
    weights = np.zeros(shape, np.float32)
    for i, (symbols, classes) in enumerate(texts):
      made['tokens'][i, : len(symbols)] = symbols
      made['targets'][i, : len(symbols)] = classes
      weights[i, : len(symbols)] = 1
    return made | {'weights': weights}

  return draw


# The other memories commit every 512 tokens, that is after the longest strings:
# where they changed at every token, or at tokens that training did not reach,
# parity was not learned beyond its lengths.
#
# State tracking needs factors below zero along a key: alpha - 2 eta at chunk 1,
# eta starting near 1.
TRACKS = {
  'chunk_mem': 1,
  'chunk_rest': 512,
  'eta_max': 1.0,
  'eta_bias': 2.0,
}
# A counter needs a factor of 1 instead. With unit keys the delta rule and the
# L2 gradient take off `eta (2 - <v, k>)` of what stands along a key for every
# eta that they write there, so that a head counts to no more than 1 / eta or
# so; the dot product with a value that is not generated takes off nothing.
COUNTS = {
  'chunk_mem': 64,
  'chunk_rest': 512,
  'eta_max': 1.0,
  'eta_bias': 2.0,
  'objective': 'dot',
  'delta': False,
  'retention': False,
  'generated': False,
  'adaptive': ('k', 'v'),
}


def problem(name: str, options: Options) -> problems.Problem:
  """One language as something to train for."""
  language = LANGUAGES[name]
  low = 1 if language.letters else 2
  long = options.longest + 1 + (not language.letters), options.beyond
  short = low, options.longest

  def bins(of_half: int) -> dict[str, problems.Draw]:
    # of one width, so that they are one program
    widest = True, options.beyond, of_half
    lengths = {'bin 0': short, 'bin 1': long}
    return {
      name: strings(language, *ends, *widest) for name, ends in lengths.items()
    }

  return problems.Problem(
    name,
    language.V,
    strings(language, *short, distinct=False),
    bins(1),
    trainable.whole_rows,
    {'longest': options.longest, 'beyond': options.beyond, 'halves': True},
    {'tied': False, 'memory': {'remat': False}},
    {'hope': {'memory': COUNTS if language.counts else TRACKS}},
    valid=bins(0),
  )


def cells(options: Options, asked: suite.Asked) -> Iterator[suite.Cell]:
  """All languages, each for all models."""
  every = [problem(name, options) for name in LANGUAGES]
  return trials.cells(every, options.train, asked)


def _paper(*numbers: float) -> dict[str, float]:
  bins = [f'{name} bin {i}' for name in LANGUAGES for i in (0, 1)]
  return dict(zip(bins, numbers))


EVALUATION = suite.Evaluation(
  'formal',
  Options(),
  cells,
  'Strings all of whose predictions are right, %: lengths as in training (bin '
  '0) and longer ones (bin 1).',
  {
    'LSTM': _paper(*[100.0] * 12),
    'Transformer': _paper(46.4, 0, 0, 0, 0, 0, *[100.0] * 6),
    'Linear': _paper(78.1, 0, 0, 0, 0, 0, *[100.0] * 6),
    'DeltaNet': _paper(98.2, 10.1, 0, 0, 0, 0, *[100.0] * 6),
    'SRWM': _paper(*[100.0] * 12),
    'Hope': _paper(*[100.0] * 12),
  },
  'NL, Table 5',
)
