"""Checkpoints of a run: complete or absent, and the newest readable one."""

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from grain import checkpoint as grain_checkpoint

from nestax.launch import damage, fingerprints
from nestax.launch.configs import common
from nestax.launch.damage import CheckpointError as CheckpointError
from nestax.launch.damage import OtherConfigError as OtherConfigError


def check_writable(workdir: str | os.PathLike) -> None:
  """Makes the folder, and a file in it for a moment.

  Raises:
    PermissionError: naming the folder and the reason.
  """
  workdir = pathlib.Path(workdir)
  probe = workdir / f'.probe-{os.getpid()}'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe.write_text('x')
    probe.unlink()
  except OSError as error:
    raise PermissionError(
      f'cannot write in the workdir {workdir}: {error.strerror}; give another '
      'one with --workdir'
    ) from error


class _Position:
  """Takes the data position out of a checkpoint and holds it.

  The pipeline refuses the position of another corpus, which is not damage.
  """

  def set_state(self, state: bytes) -> None:
    self.state = json.loads(state)

  def start_prefetch(self) -> None:
    pass


class Checkpoints:
  """The checkpoints of one workdir, written in the background.

  Each holds the train state, the position in the data and the config.
  """

  def __init__(self, workdir, config, say: Callable[[str], None] = print):
    """Opens `workdir/checkpoints`.

    Args:
      workdir: of the run.
      config: ConfigDict of the run; reads `checkpoint.keep`.
      say: what to tell the user, a line at a time.
    """
    damage.silence_stack_traces()
    self._folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self._config = common.plain(config)
    self._say = say
    self._saving: int | None = None
    for name in damage.unfinished(self._folder):
      say(f'checkpoint {name} was interrupted while it was saved: left out')
    options = ocp.CheckpointManagerOptions(
      max_to_keep=config.checkpoint.keep, cleanup_tmp_directories=True
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def save(self, step: int, state, data) -> None:
    """Starts to save; the arrays are copied before this returns.

    Args:
      step: the state's.
      state: a NamedTuple of pytrees, such as TrainState.
      data: iterator of the training data, after the batch of this step.

    Raises:
      CheckpointError: if this one, or the one before, could not be written.
    """
    self.wait()
    if step in self._manager.all_steps():
      return
    about = {
      'config': self._config,
      'fingerprints': fingerprints.of(state._asdict()),
    }
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=grain_checkpoint.CheckpointSave(data),
      about=ocp.args.JsonSave(about),
    )
    self._saving = step
    self._guard(lambda: self._manager.save(step, args=args))

  def check(self) -> None:
    """Raises a CheckpointError if the save in the background has failed.

    Does not wait. The manager's own check misses what its last thread found.
    """
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits until the last save is complete, or raises a CheckpointError."""
    self._guard(self._manager.wait_until_finished)
    self._saving = None

  def keep_only(self, step: int) -> None:
    """Deletes all checkpoints but one, those set aside as damaged too."""
    for other in self._manager.all_steps():
      if other != step:
        self._guard(functools.partial(self._manager.delete, other))
    shutil.rmtree(self._folder.parent / 'damaged', ignore_errors=True)

  def close(self) -> None:
    self._guard(self._manager.close)

  def _guard(self, act: Callable[[], Any]) -> None:
    try:
      act()
    # Orbax and TensorStore raise ValueError, OSError and bare Exception.
    except Exception as error:
      there = ocp.utils.checkpoint_steps(self._folder)
      kept = f'that of step {max(there)} is complete' if there else 'none yet'
      raise CheckpointError(
        f'checkpoint {self._saving} could not be written to {self._folder}: '
        f'{damage.reason(error)}. Earlier checkpoints are untouched ({kept}).'
      ) from error

  def restore(self, abstract, data):
    """Restores the newest checkpoint that can be read.

    Args:
      abstract: shapes and shardings of the state, on the mesh of today.
      data: iterator whose position is set.

    Returns:
      The state, or None where there is no checkpoint. Checkpoints that cannot
      be read are named to the user and moved to `workdir/damaged`.

    Raises:
      OtherConfigError: naming the keys that differ.
      CheckpointError: if there are checkpoints and none can be read.
    """
    position = _Position()
    args = {
      'state': ocp.args.StandardRestore(abstract),
      'data': grain_checkpoint.CheckpointRestore(position),
    }

    def read(step: int):
      about = _about(self._manager, step)
      _check_config(about['config'], self._config, self._folder / str(step))
      found = self._manager.restore(step, args=ocp.args.Composite(**args))
      fingerprints.check(about['fingerprints'], found.state._asdict())
      return found.state

    step, state, damaged = damage.newest_readable(
      self._folder, self._manager.all_steps(), read, self._say
    )
    if step is None:
      return None
    try:
      data.set_state(position.state)
    except ValueError as error:
      raise OtherConfigError(
        f'checkpoint {step} in {self._folder}: {error}'
      ) from error
    for number in damaged:
      self._set_aside(number)
    self._say(f'resuming from checkpoint {step} in {self._folder}')
    return state

  def _set_aside(self, step: int) -> None:
    """Makes room for the step to be saved again, without deleting anything."""
    if jax.process_index() == 0:
      there = self._folder.parent / 'damaged'
      there.mkdir(exist_ok=True)
      free = next(
        n for n in range(10**6) if not (there / f'{step}-{n}').exists()
      )
      (self._folder / str(step)).rename(there / f'{step}-{free}')
    self._manager.reload()


def load_params(
  workdir,
  abstract: Callable[[dict], Any],
  say: Callable[[str], None] = print,
):
  """Loads the parameters alone from the newest readable checkpoint.

  Args:
    workdir: of a run.
    abstract: from the config (a plain dict) to the parameters' shapes and
      shardings, unboxed.
    say: what to tell the user, a line at a time.

  Returns:
    The step, the config as a plain dict, the parameters.

  Raises:
    FileNotFoundError: if there is no checkpoint.
    CheckpointError: if there are checkpoints and none can be read.
  """
  damage.silence_stack_traces()
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
  if not steps:
    raise FileNotFoundError(f'no checkpoint in {folder}: train there first')
  options = ocp.CheckpointManagerOptions(read_only=True)
  with ocp.CheckpointManager(folder, options=options) as manager:

    def read(step: int):
      about = _about(manager, step)
      item = {'params': abstract(about['config'])}
      restore = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
      )
      found = manager.restore(step, args=ocp.args.Composite(state=restore))
      fingerprints.check(about['fingerprints'], found.state)
      return about['config'], found.state['params']

    step, (config, params), _ = damage.newest_readable(folder, steps, read, say)
  return step, config, params


def _check_config(there: dict, here: dict, path: pathlib.Path) -> None:
  lines = common.differing(there, here)
  if lines:
    raise OtherConfigError(
      f'the checkpoint {path} was written by another config: '
      f'{"; ".join(lines)}. Give the values it was written with, or another '
      '--workdir.'
    )


def _about(manager: ocp.CheckpointManager, step: int) -> dict:
  args = ocp.args.Composite(about=ocp.args.JsonRestore())
  return manager.restore(step, args=args).about
