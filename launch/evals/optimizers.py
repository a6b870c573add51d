"""Compares optimisers: `python -m nestax.launch.evals.optimizers --workdir=W`.

Every optimiser gets the same learning rates, seeds and steps. What is done is
kept in `W/cells`, so the same command goes on where it stopped, and several
processes with other `--optimizers` may share W; `--stages=time,report` then
times each alone and writes `table.md`, `curves.png` and `rows.jsonl`.
"""

import functools
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from nestax.launch import command, room
from nestax.launch.configs import quickstart
from nestax.launch.evals import (
  cells,
  comparison,
  contenders,
  fitting,
  orthogonal,
  pretraining,
  sweep,
  vit,
)
from nestax.optim import schedules

STAGES = ('train', 'time', 'report')
# Its own, so that the module can be imported beside the commands.
FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/optimizers',
  'Folder of the results; what it holds is not done again.',
  flag_values=FLAGS,
)  # fmt: skip
_SUITES = flags.DEFINE_list(
  'suite', ['vit', 'lm', 'orthogonal'],
  'Tasks to train on, of vit, lm and orthogonal.',
  flag_values=FLAGS,
)  # fmt: skip
_NAMES = flags.DEFINE_list(
  'optimizers', [],
  'Optimisers to compare; all if not given.',
  flag_values=FLAGS,
)  # fmt: skip
_SEEDS = flags.DEFINE_integer(
  'seeds', 3,
  'Runs at each learning rate, each with its seed.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_STEPS = flags.DEFINE_integer(
  'steps', 0,
  "Training steps of each run; 0: as many as the task's own.",
  lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_IMAGES = flags.DEFINE_string(
  'images', '',
  'MNIST for the task vit, as .npz or .csv; small digits if not given.',
  flag_values=FLAGS,
)  # fmt: skip
_STAGES = flags.DEFINE_list(
  'stages', list(STAGES),
  'What to do, of train, time and report.',
  flag_values=FLAGS,
)  # fmt: skip


class Suite(NamedTuple):
  """A task with all that its runs share."""

  task: sweep.Task
  make: Mapping[str, sweep.Make]
  rates: tuple[float, ...]
  seeds: int
  steps: int
  every: int  # steps between evaluations
  data: str = ''  # of the user's, if the task has any


def _rates(lowest: float, count: int) -> tuple[float, ...]:
  return tuple(float(f'{lowest * 2**i:.6g}') for i in range(count))


def _every(steps: int, evaluations: int) -> int:
  return math.gcd(steps, max(1, steps // evaluations))


def _shapes(task):
  return jax.eval_shape(task.init, task.data, jnp.int32(0))


def make_orthogonal(seeds: int, steps: int = 0) -> Suite:
  """The continual problem: constant rate, no weight decay, all optimisers."""
  steps = steps or 512
  task = orthogonal.task(seeds, steps)
  shapes = _shapes(task)
  make = {
    name: contenders.make(name, shapes, orthogonal.RULES, lambda _: 1.0, 0.0)
    for name in contenders.NAMES
  }
  return Suite(task, make, _rates(1e-3, 11), seeds, steps, _every(steps, 64))


def make_vit(seeds: int, steps: int = 0, images: str = '') -> Suite:
  """The vision transformer: warm-up over a tenth, then half a cosine."""
  steps = steps or 400
  task = vit.task(*vit.load(images), vit.VisionTransformer())
  shapes = _shapes(task)
  schedule = schedules.warmup_cosine(1.0, steps // 10, steps)
  make = {
    name: contenders.make(name, shapes, vit.RULES, schedule)
    for name in ('adamw', 'muon', 'm3', 'sgdm', 'delta')
  }
  rates, every = _rates(2.5e-4, 10), _every(steps, 20)
  return Suite(task, make, rates, seeds, steps, every, images)


def make_lm(seeds: int, steps: int = 0) -> Suite:
  """The quickstart's model, data and schedule, as nestax-train trains it."""
  config = quickstart.get_config()
  config.train.steps = steps or config.train.steps
  config.opt.warmup = config.train.steps // 10
  config.data.valid_batches = 16  # half of them to pick the learning rate
  task = pretraining.task(config, seeds)
  make = {}
  for name in ('adamw', 'muon', 'm3'):
    config.optimizer = name
    make[name] = contenders.of_config(config, _shapes(task))
  steps = config.train.steps
  return Suite(task, make, _rates(1.5e-3, 7), seeds, steps, _every(steps, 20))


def train(suite: Suite, title: str, name: str, folder: pathlib.Path) -> None:
  """Trains one cell, all rates and seeds at once, unless it is there."""
  key = {'suite': title, 'optimizer': name, 'steps': suite.steps}
  key |= {'seeds': suite.seeds, 'rates': list(suite.rates)}
  key |= {'data': suite.data}
  path = folder / 'cells' / f'{title}-{name}.json'
  if cells.read(path, key) is not None:
    return

  def say(step, seconds):
    if step * 4 % suite.steps == 0:
      words = f'{title} {name}: step {step}/{suite.steps}, {seconds:.0f} s'
      print(words, flush=True)

  grid = suite.rates, suite.seeds, suite.steps, suite.every
  rows = fitting.run(suite.task, suite.make[name], *grid, say=say)
  cells.write(path, key, [_of(key) | row for row in rows])


def clock(suite: Suite, title: str, name: str, folder: pathlib.Path) -> None:
  """Times a step of one run, unless that is there."""
  key = {'suite': title, 'optimizer': name, 'timed': True, 'data': suite.data}
  path = folder / 'cells' / f'{title}-{name}-time.json'
  if cells.read(path, key) is None:
    rate = suite.rates[0]
    seconds = sweep.seconds_per_step(suite.task, suite.make[name], rate)
    cells.write(path, key, [_of(key) | {'ms_per_step': seconds * 1e3}])


def _of(key):
  return {name: key[name] for name in ('suite', 'optimizer')}


def compare(
  suites: Mapping[str, Callable[[], Suite]],
  folder: pathlib.Path,
  names: list[str],
  stages: list[str],
) -> None:
  """Goes through the stages.

  Args:
    suites: makes each suite; data is read only where a stage needs it.
    folder: for results.
    names: of optimisers; those that a suite does not have are passed over.
    stages: of STAGES.
  """
  for title, make_suite in suites.items():
    if {'train', 'time'} & set(stages):
      suite = make_suite()
      for name in [n for n in suite.make if not names or n in names]:
        if 'train' in stages:
          train(suite, title, name, folder)
        if 'time' in stages:
          clock(suite, title, name, folder)
  if 'report' in stages:
    print(comparison.write(folder))


def main(argv: list[str]) -> int:
  """Compares; returns 0, or 2 for what cannot be done."""
  seeds, steps = _SEEDS.value, _STEPS.value
  suites = {
    'vit': functools.partial(make_vit, seeds, steps, _IMAGES.value),
    'lm': functools.partial(make_lm, seeds, steps),
    'orthogonal': functools.partial(make_orthogonal, seeds, steps),
  }
  try:
    for given, known in (
      (argv[1:], ()),
      (_SUITES.value, suites),
      (_NAMES.value, contenders.NAMES),
      (_STAGES.value, STAGES),
    ):
      for word in given:
        if word not in known:
          raise ValueError(
            f'{word!r} is not one of {", ".join(known) or "none"}'
          )
    chosen = {title: suites[title] for title in _SUITES.value}
    workdir = pathlib.Path(_WORKDIR.value)
    with room.wanted('a run'):
      compare(chosen, workdir, _NAMES.value, _STAGES.value)
  except (ValueError, OSError, room.OutOfMemory) as error:
    print(f'optimizers: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  parse = command.parser('optimizers', __doc__, FLAGS)
  app.run(main, flags_parser=parse)
