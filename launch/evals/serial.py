"""Trains a task's runs one after another, each by the same compiled programs.

`sweep` trains runs side by side, which pays where one leaves the machine idle.
Models that fill it go one by one: memory is that of one run, its time is its
own, and what is done can be kept. A run's learning rate, seed and number of
steps are arguments of the programs, so that each is compiled once for all.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestax.launch.evals import cells, picking, sweep

# of a (traced) learning rate and the steps of the schedule
Make = Callable[..., optax.GradientTransformation]


class Kept(NamedTuple):
  """Where runs that are done lie, and what they all depend on."""

  folder: pathlib.Path
  key: dict


class Course(NamedTuple):
  """Which runs there are.

  Attributes:
    rates: learning rates.
    seeds: 0 to seeds - 1 each.
    steps: of each run.
    trial: steps of a shorter training of the first seed at each rate; the runs
      are of the rate that is best by `valid` at its end. 0: no such thing.
    every: steps between two evaluations; a divisor of both.
  """

  rates: Sequence[float]
  seeds: int
  steps: int
  trial: int
  every: int


class Programs(NamedTuple):
  """Compiled; `numbers` are rate, seed and steps."""

  start: Callable  # (data, *numbers) -> carry
  # of each of `sweep.Task.parts`: (data, carry, *numbers, first step) -> carry,
  # loss
  advance: Sequence[Callable]
  evaluate: Callable  # (data, parameters, seed, step) -> dict


def programs(task: sweep.Task, make: Make, every: int) -> Programs:
  """Compiles what a run of any rate, seed and length is made of."""

  def start(data, rate, seed, steps):
    params = task.init(data, seed)
    return params, make(rate, steps).init(params)

  def advance(task, data, carry, rate, seed, steps, first):
    def of_rate(rate):
      return make(rate, steps)

    return sweep.advance(task, of_rate, data, carry, rate, seed, first, every)

  def compiled(part):
    program = jax.jit(functools.partial(advance, part), donate_argnums=1)
    return program.lower(task.data, carry, *numbers, step).compile()

  numbers = jnp.float32(0), jnp.int32(0), jnp.int32(0)
  carry = jax.eval_shape(start, task.data, *numbers)
  step = jnp.int32(0)
  return Programs(
    jax.jit(start).lower(task.data, *numbers).compile(),
    [compiled(part) for part in task.parts()],
    jax.jit(task.evaluate).lower(task.data, carry[0], step, step).compile(),
  )


def run(
  compiled: Programs,
  task: sweep.Task,
  rate: float,
  seed: int,
  steps: int,
  every: int,
  say: Callable[[int], None] = lambda step: None,
  enough: Callable[[Sequence[dict]], bool] = lambda rows: False,
) -> list[dict]:
  """Trains one run.

  Returns:
    A row an evaluation, as `sweep.run` gives them, and `ms`: milliseconds of
    each of the steps before it, without evaluation and compilation.
  """
  numbers = jnp.float32(rate), jnp.int32(seed), jnp.int32(steps)
  data = task.data
  carry = compiled.start(data, *numbers)
  rows = []
  for i, which in enumerate(task.plan(steps, every)):
    first = i * every
    jax.block_until_ready(carry)
    began = time.perf_counter()
    carry, loss = compiled.advance[which](
      data, carry, *numbers, jnp.int32(first)
    )
    jax.block_until_ready(carry)
    ms = 1e3 * (time.perf_counter() - began) / every
    step = first + every
    said = compiled.evaluate(data, carry[0], numbers[1], jnp.int32(step))
    found = {name: sweep.finite(np.asarray(x)) for name, x in said.items()}
    row = {'rate': rate, 'seed': seed, 'step': step}
    row |= {'train': sweep.finite(np.asarray(loss)), 'ms': ms}
    rows.append(row | found)
    say(step)
    if enough(rows):
      break
  return rows


def step_ms(rows: Sequence[dict]) -> float | None:
  """Mean over a run's steps after its first evaluation, if there are any."""
  later = [row['ms'] for row in rows[1:]]
  return sum(later) / len(later) if later else None


def compare(
  task: sweep.Task,
  make: Make,
  course: Course,
  kept: Kept | None = None,
  say: Callable[[int, int], None] = lambda done, of: None,
  enough: Callable[[Sequence[dict]], bool] = lambda rows: False,
) -> tuple[list[dict], list[dict]]:
  """Trains every rate with every seed, or after a trial one rate with each.

  Args:
    task: what is trained.
    make: its optimiser.
    course: which runs.
    kept: where runs are kept and looked for; None: nowhere.
    say: told steps done, and steps of all runs together.
    enough: ends a run, given its rows.

  Returns:
    Rows of the runs, and of the trial where there is one.
  """
  rates, seeds, steps, trial, every = course
  of = len(rates) * trial + (1 if trial else len(rates)) * seeds * steps
  done = 0

  @functools.cache
  def compiled():  # not before there is a run to do
    return programs(task, make, every)

  def one(rate, seed, many):
    nonlocal done
    rows = _look(kept, rate, seed, many)
    if rows is None:
      tell = (lambda step: say(done + step, of)), enough
      rows = run(compiled(), task, rate, seed, many, every, *tell)
      _keep(kept, rate, seed, many, rows)
    done += many
    say(done, of)
    return rows

  tried = []
  if trial:
    tried = [row for rate in rates for row in one(rate, 0, trial)]
    rates = [picking.pick(picking.scored(tried, picking.Rule()), rates)[0]]
  runs = [one(rate, seed, steps) for rate in rates for seed in range(seeds)]
  return [row for rows in runs for row in rows], tried


def _file(kept: Kept, rate: float, seed: int, steps: int):
  key = kept.key | {'rate': rate, 'seed': seed, 'run': steps}
  return kept.folder / f'{rate:g}_{seed}_{steps}.json', key


def _look(kept: Kept | None, *which) -> list[dict] | None:
  return cells.read(*_file(kept, *which)) if kept else None


def _keep(kept: Kept | None, rate, seed, steps, rows) -> None:
  if kept:
    cells.write(*_file(kept, rate, seed, steps), rows)
