"""Multi-query associative recall: accuracy by number of pairs and by width.

As Arora et al. 2023 define it ('Zoology: Measuring and Improving Recall in
Efficient Language Models'; code: github.com/HazyResearch/zoology): n pairs of a
key and a value, each id once in a row, the keys out of the first half of the
vocabulary (without 0) and the values out of the second; then every key once
more, at even distances behind the pairs that are drawn without replacement
from a power law (index a - 1, a = 0.01: the first are the likeliest), and
random ids in between. At each of these keys the model says the value; nothing
else is scored or trained.

One model a width is trained on rows of 4 to `most` pairs (100 : 20 : 20 ... of
them) and tested on rows of 4 to `beyond`, `max(64, 4 n)` tokens long.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from nestax.launch.evals import problems, suite, trainable, trials

FEWEST = 4
POWER = 0.01


@dataclasses.dataclass(frozen=True)
class Options:
  """The sizes of Zoology's figures, or smaller ones.

  Attributes:
    V: vocabulary.
    most: pairs of a row to train on, a power of two, at least 4.
    beyond: most pairs of a row to test on, the same.
    widths: a comma between them.
    train: how models are trained; `D` is each of the widths.
  """

  V: int = 8192
  most: int = 64
  beyond: int = 256
  widths: str = '64,128'
  train: trials.Training = trials.Training(
    N=2,
    H=1,
    steps=22_500,
    batch=256,
    examples=180_000,
    tests=1024,
    rates=(1e-3, 3e-3, 1e-2),
  )

  def __post_init__(self):
    for name in ('most', 'beyond'):
      pairs = getattr(self, name)
      if pairs < FEWEST or pairs & (pairs - 1):
        raise ValueError(f'{name}={pairs}: a power of two, at least {FEWEST}')
    if self.V < 4 * max(self.most, self.beyond):
      raise ValueError(
        f'V={self.V}: {max(self.most, self.beyond)} pairs of distinct keys and '
        'values want at least four times as many ids'
      )
    _ = self.width_list

  @property
  def width_list(self) -> list[int]:
    try:
      return [int(word) for word in self.widths.split(',')]
    except ValueError:
      raise ValueError(
        f'widths={self.widths!r}: whole numbers with commas between'
      ) from None


def powers(most: int) -> list[int]:
  """4, 8, ... to `most` pairs."""
  return [2**i for i in range(2, most.bit_length())]


def recall(V: int, pairs: int, L: int, rng, rows: int) -> problems.Batch:
  """Rows of L tokens with `pairs` pairs each.

  Args:
    V: vocabulary.
    pairs: of each row.
    L: tokens, even, at least four times the pairs.
    rng: numpy generator.
    rows: how many.
  """
  half = V // 2
  keys = 1 + distinct(rng, rows, pairs, half - 1)
  values = half + distinct(rng, rows, pairs, V - half)
  tokens = rng.integers(0, V, (rows, L))
  tokens[:, 0 : 2 * pairs : 2] = keys
  tokens[:, 1 : 2 * pairs : 2] = values
  space = (L - 2 * pairs) // 2
  weight = np.arange(1, space + 1) ** (POWER - 1.0)
  # Without replacement, each in turn by weight: the largest of the logarithms
  # with Gumbel noise.
  noisy = np.log(weight) + rng.gumbel(size=(rows, space))
  gap = np.argsort(-noisy, 1)[:, :pairs]
  at = 2 * pairs + 2 * gap
  np.put_along_axis(tokens, at, keys, 1)
  targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
  np.put_along_axis(targets, at, values, 1)
  np.put_along_axis(weights, at, 1.0, 1)
  made = {'tokens': tokens, 'targets': targets}
  return {k: x.astype(np.int32) for k, x in made.items()} | {'weights': weights}


def distinct(rng, rows: int, many: int, ids: int) -> np.ndarray:
  """`many` different ids below `ids` in every row, in random order."""
  found = []
  for start in range(0, rows, 1024):  # bounds the memory
    chance = rng.random((min(1024, rows - start), ids))
    chosen = np.argpartition(chance, many - 1, 1)[:, :many]
    found.append(rng.permuted(chosen, axis=1))
  return np.concatenate(found)


def mixture(options: Options) -> problems.Draw:
  """Rows to train on, of 4 to `most` pairs, padded to the longest."""
  counts = powers(options.most)
  longest = max(64, 4 * options.most)
  shares = np.array([5.0] + [1.0] * (len(counts) - 1))

  def draw(rng, rows: int) -> problems.Batch:
    many = np.floor(rows * shares / shares.sum()).astype(int)
    many[0] += rows - many.sum()
    parts = []
    for pairs, part in zip(counts, many):
      L = min(longest, max(64, 16 * pairs))
      made = recall(options.V, pairs, L, rng, part)
      pad = (0, 0), (0, longest - L)
      parts.append({name: np.pad(x, pad) for name, x in made.items()})
    return {
      name: np.concatenate([part[name] for part in parts]) for name in parts[0]
    }

  return draw


def problem(width: int, options: Options) -> problems.Problem:
  """The task for models of one width."""

  def test(pairs):
    L = max(64, 4 * pairs)
    return lambda rng, rows: recall(options.V, pairs, L, rng, rows)

  return problems.Problem(
    f'width {width}',
    options.V,
    mixture(options),
    {str(pairs): test(pairs) for pairs in powers(options.beyond)},
    trainable.tokens_right,
    {'V': options.V, 'most': options.most, 'beyond': options.beyond},
  )


def cells(options: Options, asked: suite.Asked) -> Iterator[suite.Cell]:
  """All widths, each for all models."""
  for width in options.width_list:
    train = dataclasses.replace(options.train, D=width)
    yield from trials.cells([problem(width, options)], train, asked)


EVALUATION = suite.Evaluation(
  'mqar',
  Options(),
  cells,
  'Values said at the repeated keys that are right, %, by number of pairs.',
  axis='key-value pairs',
)
