"""The steps of a run: read, learn, write down, evaluate, save, stop."""

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from nestax.launch import checkpoint, distributed, goodput, metrics, profile
from nestax.launch.prepare import Plan
from nestax.launch.signals import Interrupted
from nestax.launch.step import TrainState

# Of seconds a step. Longer ones gain nothing from another in the queue, and a
# signal would have to wait for both.
LONG = 2.0


class BadSteps(RuntimeError):
  """Too many steps in a row had a loss or a gradient that is not finite."""


class Loop(NamedTuple):
  """What the steps of a run work with.

  Attributes:
    plan: of the run.
    done: steps that were made before.
    last: the step after which it ends.
    step: `(state, batch) -> (state, metrics)`.
    data: batches of this process, on the host.
    lay: puts one on the devices.
    evaluate: of parameters; see `validation.evaluate`.
    stopped: the signal that all processes have agreed on, 0 for none.
    checkpoints: where states are saved.
    log: where numbers are written.
    speed: counts tokens a second.
    show: where a person looks on.
    traced: the steps of which a trace is wanted.
    spent: where the time goes.
  """

  plan: Plan
  done: int
  last: int
  step: Callable
  data: Iterator[dict]
  lay: Callable[[dict], dict]
  evaluate: Callable[[Any], tuple[dict[str, float] | None, int]]
  stopped: Callable[[], int]
  checkpoints: checkpoint.Checkpoints
  log: metrics.Log
  speed: metrics.Speed
  show: Any
  traced: profile.Profile
  spent: goodput.Goodput

  def close(self) -> None:
    for part in (self.traced, self.show, self.log, self.data, self.checkpoints):
      part.close()


def run(loop: Loop, state: TrainState) -> TrainState:
  """Makes the steps from `done` to `last`.

  Raises:
    Interrupted: after saving, when SIGTERM or SIGINT came.
    BadSteps: after `train.max_bad_steps` of them in a row, or if all were.
    checkpoint.CheckpointError: if checkpoints cannot be written.
  """
  config, done, last = loop.plan.config, loop.done, loop.last
  _catch_up(loop, state)
  late = None  # metrics are read when the step after is under way
  alone = False
  for number in range(done + 1, last + 1):
    begun = time.monotonic()
    state, fresh = _one(loop, state, number)
    if late:
      _report(loop, *late)
    late = number, fresh
    if alone:
      numbers, late = _report(loop, *late), None
    alone = time.monotonic() - begun > LONG
    stop = loop.stopped()
    every = config.eval.every, config.checkpoint.every
    if stop or any(_due(number, n, last) for n in every):
      if late:
        numbers, late = _report(loop, *late), None
      _pause(loop, state, number, numbers['bad'], stop)
  loop.spent.turn('checkpoint')
  loop.checkpoints.wait()
  loop.spent.turn('other')
  if last > done and int(state.skipped) >= last:
    raise BadSteps(
      f'all {last} steps had a loss, gradient or parameters that are not '
      'finite: nothing was learned. A lower opt.lr or a longer opt.warmup '
      'may help'
    )
  return state


def _catch_up(loop: Loop, state: TrainState) -> None:
  """Evaluates where a run was stopped that should have done so."""
  done, stop = loop.done, 0
  missed = _due(done, loop.plan.config.eval.every, loop.last) and done > 0
  missed = missed and loop.log.last('valid', done) is None
  if distributed.told('missed' if missed else ''):
    found, stop = loop.evaluate(state.params)
    if found:
      loop.log.write(done, 'valid', found)
  if stop:
    raise _interrupted(stop, done, loop.plan.workdir)


def _one(loop: Loop, state: TrainState, number: int):
  loop.spent.turn('data')
  batch = loop.lay(next(loop.data))
  loop.spent.call('train step', 'compute')
  with loop.traced.step(number), jax.transfer_guard('disallow'):
    state, fresh = loop.step(state, batch)
  loop.spent.turn('compute')
  loop.traced.after(number, fresh)
  return state, fresh


def _report(loop: Loop, number: int, fresh) -> dict[str, float]:
  """Reads a step's metrics, writes and shows them, and stops at bad ones."""
  config = loop.plan.config
  numbers = {k: float(v) for k, v in jax.device_get(fresh).items()}
  if number == loop.done + 1:
    loop.speed.start(number)  # the first step is mostly compilation
  if _due(number, config.log.every, loop.last):
    numbers |= loop.speed.read(number)
    loop.log.write(number, 'train', numbers | loop.spent.read())
  loop.show.update(number, numbers)
  if numbers['bad'] >= config.train.max_bad_steps:
    raise BadSteps(
      f'{numbers["bad"]:.0f} steps in a row up to step {number} had a loss or '
      'gradient that is not finite: stopped. Checkpoints from before are '
      'kept; a lower opt.lr, a longer opt.warmup or a lower opt.clip may help'
    )
  return numbers


def _pause(
  loop: Loop, state: TrainState, number: int, bad: float, stop: int
) -> None:
  """Evaluates and saves where that is due, and obeys a signal."""
  config, found = loop.plan.config, None
  if _due(number, config.eval.every, loop.last) and not stop:
    found, stop = loop.evaluate(state.params)
  if found:
    loop.log.write(number, 'valid', found)
  loop.spent.turn('checkpoint')
  saving = _due(number, config.checkpoint.every, loop.last)
  # A state in the middle of bad steps must not push out better ones. At the end
  # it is all that is left of the good steps before, if there were any.
  good = not bad or number == loop.last and bad < number
  if stop or (saving and good):
    loop.log.sync()
    bits = found and found['bits_per_byte']
    loop.checkpoints.save(number, state, loop.data, bits)
  else:
    loop.checkpoints.check()
  if stop:
    loop.checkpoints.wait()
    raise _interrupted(stop, number, loop.plan.workdir)
  loop.speed.start(number)


def _interrupted(number: int, step: int, workdir) -> Interrupted:
  return Interrupted(
    f'{signal.Signals(number).name}: saved checkpoint {step} in {workdir}; '
    'the same command goes on from there',
    number,
  )


def _due(number: int, every: int, last: int) -> bool:
  return number == last or (every > 0 and number % every == 0)
