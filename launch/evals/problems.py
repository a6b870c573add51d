"""What small models are trained and tested on: problems, and rows drawn."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nestax.launch.evals import sweep
from nestax.launch.evals.training import Training
from nestax.models.config import ModelConfig

# `tokens`, `targets` int32 and `weights` float32, each `[rows, L]`; a row of no
# weight at all is padding.
Batch = dict[str, Any]
Draw = Callable[[np.random.Generator, int], Batch]


DOES = {'valid': 'pick the rate by', 'tests': 'test'}


class Net(NamedTuple):
  """What is trained: `init(key, tokens_BxL)`, `apply(params, tokens_BxL)`."""

  init: Callable
  apply: Callable  # -> logits_BxLxV float32


class Problem(NamedTuple):
  """A task, from nothing but seeds.

  Attributes:
    name: heading in the table.
    V: ids there are, of tokens and targets.
    train: (generator, rows) -> rows to train on.
    tests: name of a score -> the same for rows to test on; may give fewer
      rows than asked for, if there are no more.
    score: (logits, batch) -> sum and weight, scalars; the score is the
      quotient of all batches' sums, times 100 unless less is better.
    key: plain dict of what the rows depend on.
    base: config keys that all families share here, see `entrants.config`.
    own: the same for one family alone.
    net: what a config is trained as; a language model unless given.
    less: less is better; `valid` is then the negative score.
    valid: as `tests`, for rows to pick the rate by; None: those of `tests`,
      which then have to give other rows whenever they are asked.
    early: as `train`, shorter rows for the first steps, one after another, as
      many more rows a step as they are shorter.
    share: of all steps that are early, about as many of each of `early`.
  """

  name: str
  V: int
  train: Draw
  tests: Mapping[str, Draw]
  score: Callable
  key: dict
  base: dict = {}
  own: dict = {}
  net: Callable[[ModelConfig], Net] | None = None
  less: bool = False
  valid: Mapping[str, Draw] | None = None
  early: Sequence[Draw] = ()
  share: float = 0.0


def data(problem: Problem, training: Training, seeds: int) -> dict:
  """Draws all rows, and says which of them every seed's batches are made of.

  Returns:
    `train`, and `early 0`... where the problem has such rows: rows, each with
    its `order`, indices `[seeds, steps, batch]`, of early rows for the steps
    that read them; `valid` and `tests`: by name, in batches.
  """

  def rng(*words) -> np.random.Generator:
    return np.random.default_rng([*'/'.join(words).encode()])

  rows = problem.train(rng('train'), training.examples)
  drawn = _ordered('train', rows, training.batch, training.steps, seeds)
  L = rows['tokens'].shape[1]
  for i, draw in enumerate(problem.early):
    again = functools.partial(rng, f'early {i}')
    read = steps_of(problem, training, i)
    drawn |= _early(f'early {i}', draw, training, read, seeds, L, again)
  valid = problem.tests if problem.valid is None else problem.valid
  for split, draws, many in (
    ('valid', valid, training.tests // 2),
    ('tests', problem.tests, training.tests),
  ):
    drawn[split] = {}
    for name, draw in draws.items():
      rows = draw(rng(split, name), many)
      if not len(rows['tokens']):
        raise ValueError(
          f'{problem.name}: of {name} there are no rows to {DOES[split]}; give '
          'longer rows or wider bins'
        )
      drawn[split][name] = in_batches(rows, training.batch)
  return drawn


def steps_of(problem: Problem, training: Training, part: int):
  """Steps that read the early rows of a part: (in a run, only in a trial)."""
  early, every = len(problem.early), training.every

  def read(steps):
    plan = sweep.plan(early, problem.share, steps, every) if steps else []
    return [i for i in range(steps) if plan[i // every] == part]

  run, trial = read(training.steps), read(training.trial)
  return run, [i for i in trial if i not in set(run)]


def _early(name, draw: Draw, training: Training, read, seeds: int, L: int, rng):
  """Shorter rows, as many more as rows of L tokens are longer."""
  of_one = draw(rng(), 1)['tokens'].size
  times = max(1, L // of_one)
  batch = training.batch * times
  run, trial = read
  # a run reads the same rows whatever trial there is: its steps come first
  most = min(training.examples, len(run) * training.batch) * times
  read = run + trial
  made = _ordered(name, draw(rng(), most), batch, len(read), seeds)
  order = np.zeros((seeds, training.steps, batch), np.int32)
  order[:, read] = made[f'{name} order']
  return made | {f'{name} order': order}


def _ordered(name: str, rows: Batch, batch: int, steps: int, seeds: int):
  """Rows to train on, and which of them are in the batches of every seed."""
  order = [
    _order(np.random.default_rng(seed), len(rows['tokens']), steps, batch)
    for seed in range(seeds)
  ]
  return {name: rows, f'{name} order': np.stack(order)}


def _order(rng, rows: int, steps: int, batch: int) -> np.ndarray:
  """Indices of rows, `[steps, batch]`: epochs, each in an order of its own."""
  epochs = -(-steps * batch // rows)
  whole = np.concatenate([rng.permutation(rows) for _ in range(epochs)])
  return whole[: steps * batch].reshape(steps, batch).astype(np.int32)


FEW = 32  # fewer rows are filled up, so that tests of a few are of one shape


def in_batches(rows: Batch, batch: int) -> Batch:
  """Lays rows out as `[batches, batch, L]`, the last filled up with nothing."""
  found = len(rows['tokens'])
  batch = min(batch, -(-found // FEW) * FEW)
  missing = -found % batch

  def lay(x):
    x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
    return x.reshape(-1, batch, *x.shape[1:])

  return {name: lay(x) for name, x in rows.items()}
