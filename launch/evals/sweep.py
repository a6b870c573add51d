"""Trains one task at many learning rates and seeds at once, in one program."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Make = Callable[[Any], optax.GradientTransformation]  # of a learning rate


class Task(NamedTuple):
  """What is trained; all functions are traced, for one run each.

  Attributes:
    data: a pytree of arrays that all runs share.
    init: (data, seed) -> parameters.
    batch: (data, seed, step) -> batch.
    loss: (params, batch) -> scalar.
    evaluate: (data, params, seed, step) -> dict of scalars, low if good.
    select: which of them the learning rate is picked by.
    inputs: batch -> the layers' inputs that `optim.dgd` asks for; None where
      there are none to give.
    early: as `batch`, of other shapes, for the first steps, one after another.
    share: of all steps that are early, about as many of each of `early`: whole
      stretches between two evaluations.
  """

  data: Any
  init: Callable
  batch: Callable
  loss: Callable
  evaluate: Callable
  select: str
  inputs: Callable | None = None
  early: Sequence[Callable] = ()
  share: float = 0.0

  def parts(self) -> list['Task']:
    """The tasks of early steps in order, and that of the others."""
    return [self._replace(batch=batch) for batch in (*self.early, self.batch)]

  def plan(self, steps: int, every: int) -> list[int]:
    """Which of `parts` each stretch of `every` steps belongs to."""
    return plan(len(self.early), self.share, steps, every)


def plan(early: int, share: float, steps: int, every: int) -> list[int]:
  """Which of so many early parts, or of the rest, each stretch belongs to.

  Raises:
    ValueError: if a part is left without a stretch.
  """
  ends = [share * steps * (i + 1) / early for i in range(early)]
  ends = [every * math.floor(end / every + 0.5) for end in ends]
  which = [
    sum(first >= end for end in ends) for first in range(0, steps, every)
  ]
  if len(set(which)) <= early:
    raise ValueError(
      f'share={share} of {steps} steps, evaluated every {every}: {early} '
      'lengths of early rows and the last one want a stretch between two '
      'evaluations each, and not all get one; give more evaluations, or '
      'another share'
    )
  return which


def run(
  task: Task,
  make: Make,
  rates: Sequence[float],
  seeds: int,
  steps: int,
  every: int,
  say: Callable[[int, float], None] = lambda step, seconds: None,
  enough: Callable[[Sequence[dict]], bool] = lambda rows: False,
  first: int = 0,
) -> list[dict]:
  """Trains a run of each rate and seed, side by side.

  Args:
    task: what is trained.
    make: the optimiser of a (traced) learning rate.
    rates: learning rates.
    seeds: `first` to seeds - 1 each.
    steps: of each run.
    every: steps between two evaluations; a divisor of `steps`.
    say: told the step and the seconds since the first evaluation, which
      leave compilation out.
    enough: given all rows so far after each evaluation; training ends where it
      says so.
    first: the seed to begin with.

  Returns:
    A row for each run and evaluation: `rate`, `seed`, `step`, `train` (mean
    loss since the last row) and what `evaluate` gives; None for a number
    that is not finite.

  Raises:
    ValueError: if `every` does not divide `steps`.
  """
  if steps % every:
    raise ValueError(f'{steps} steps are no multiple of {every}: give one')
  grid = [(rate, seed) for rate in rates for seed in range(first, seeds)]
  rate_R = jnp.array([rate for rate, _ in grid], jnp.float32)
  seed_R = jnp.array([seed for _, seed in grid], jnp.int32)

  def chunk(task, data, carry, rate, seed, first):
    carry, loss = advance(task, make, data, carry, rate, seed, first, every)
    numbers = task.evaluate(data, carry[0], seed, first + every)
    return carry, {'train': loss} | numbers

  def start(data, rate, seed):
    params = task.init(data, seed)
    return params, make(rate).init(params)

  layout = _layout(start, task.data, rate_R[0], seed_R[0])
  starts = jax.vmap(start, in_axes=(None, 0, 0), out_axes=layout)
  carry = jax.jit(starts)(task.data, rate_R, seed_R)

  def compiled(part):
    program = jax.jit(
      jax.vmap(
        functools.partial(chunk, part),
        in_axes=(None, layout, 0, 0, None),
        out_axes=(layout, 0),
      ),
      donate_argnums=1,
    )
    args = task.data, carry, rate_R, seed_R, jnp.int32(0)
    return program.lower(*args).compile()

  chunks = [compiled(part) for part in task.parts()]
  rows, began = [], None
  for i, which in enumerate(task.plan(steps, every)):
    first = i * every
    carry, numbers = chunks[which](
      task.data, carry, rate_R, seed_R, jnp.int32(first)
    )
    numbers = {name: np.asarray(x) for name, x in numbers.items()}
    began = began or time.perf_counter()
    say(first + every, time.perf_counter() - began)
    for i, (rate, seed) in enumerate(grid):
      row = {'rate': rate, 'seed': seed, 'step': first + every}
      rows.append(row | {k: finite(x[i]) for k, x in numbers.items()})
    if enough(rows):
      break
  return rows


def seconds_per_step(
  task: Task, make: Make, rate: float, steps: int = 50, repeats: int = 3
) -> float:
  """Times a step of one run alone, without evaluation or compilation.

  Returns:
    Seconds, the median over `repeats` programs of `steps` steps each.
  """

  @jax.jit
  def stretch(data, carry):
    return advance(task, make, data, carry, rate, 0, 0, steps)

  params = task.init(task.data, jnp.int32(0))
  carry = params, make(rate).init(params)
  jax.block_until_ready(stretch(task.data, carry))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(stretch(task.data, carry))
    times.append(time.perf_counter() - start)
  return float(np.median(times)) / steps


def step_ms(told: Sequence[tuple[int, float]]) -> float | None:
  """From the first evaluation, which waits for compilation, to the last.

  Of several programs, one after the other, their sum.
  """
  starts = [i for i, (step, _) in enumerate(told) if step <= told[i - 1][0]]
  total = 0.0
  for i, j in zip(starts, [*starts[1:], len(told)]):
    (first, began), (last, ended) = told[i], told[j - 1]
    if last == first:
      return None
    total += 1e3 * (ended - began) / (last - first)
  return total


def stretch(steps: int, evaluations: int) -> int:
  """Steps between evaluations: a divisor that gives at most so many."""
  least = -(-steps // evaluations)
  return next(n for n in range(least, steps + 1) if steps % n == 0)


def advance(task, make, data, carry, rate, seed, first, steps):
  """Takes steps of one run in a scan; gives the carry and the mean loss."""
  tx = optax.with_extra_args_support(make(rate))

  def step(carry, number):
    params, state = carry
    batch = task.batch(data, seed, number)
    loss, grads = jax.value_and_grad(task.loss)(params, batch)
    extra = {'inputs': task.inputs(batch)} if task.inputs else {}
    updates, state = tx.update(grads, state, params, **extra)
    return (optax.apply_updates(params, updates), state), loss

  carry, losses = jax.lax.scan(step, carry, first + jnp.arange(steps))
  return carry, losses.mean()


def _layout(start, *arguments):
  """Axes of the runs: 0, but counts of steps are the same in all of them.

  With a count for each run the conditional of M3's refresh would turn into a
  selection, which orthogonalises the slow momentum at every step.
  """

  def axis(x):
    count = x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    return None if count else 0

  return jax.tree.map(axis, jax.eval_shape(start, *arguments))


def finite(x) -> float | None:
  """A number as JSON keeps it: None if it is not finite."""
  return float(x) if math.isfinite(x) else None
