"""A trace of some steps, for xprof, TensorBoard or Perfetto."""

import contextlib
import pathlib
from collections.abc import Callable

import jax


class Profile:
  """Traces `config.profile.steps` steps from step `config.profile.start` on.

  Of process 0 only: its devices do what all do. The trace lies below
  `workdir/profile`; `xprof --logdir=workdir/profile` shows it.
  """

  def __init__(self, config, workdir, done: int, say: Callable[[str], None]):
    """Traces nothing yet.

    Args:
      config: the group `profile`.
      workdir: of the run.
      done: steps that were made before.
      say: what to tell the user, a line at a time.
    """
    self._first = config.start
    self._last = config.start + config.steps - 1
    self._folder = pathlib.Path(workdir) / 'profile'
    self._say, self._on = say, False
    self._wanted = config.steps > 0 and jax.process_index() == 0
    if self._wanted and self._first <= done:
      self._wanted = False
      say(
        f'profile: step {self._first} was made before (step {done} is done): '
        'nothing is traced; give a later --config.profile.start'
      )

  def step(self, number: int) -> contextlib.AbstractContextManager:
    """Before a step: starts the trace if it is the first; names the step."""
    if self._wanted and number == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._on = True
    if not self._on:
      return contextlib.nullcontext()
    return jax.profiler.StepTraceAnnotation('train', step_num=number)

  def after(self, number: int, result) -> None:
    """After a step: ends the trace if it was the last, when that is done."""
    if self._on and number == self._last:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Ends a trace that still goes on, and says where it lies."""
    if self._on:
      self._on, self._wanted = False, False
      jax.profiler.stop_trace()
      self._say(f'profile: steps from {self._first} on in {self._folder}')
