"""Checkpoints of a run: complete or absent, and the newest readable one."""

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from grain import checkpoint as grain_checkpoint
from orbax.checkpoint import checkpoint_managers as managers

from nestax.launch import damage, distributed, fingerprints
from nestax.launch.configs import common
from nestax.launch.damage import CheckpointError as CheckpointError
from nestax.launch.damage import OtherConfigError as OtherConfigError
from nestax.launch.data import shards


def check_writable(workdir: str | os.PathLike, flag: str = 'workdir') -> None:
  """Makes the folder, and a file in it for a moment; `flag` names it.

  Raises:
    PermissionError: naming the folder and the reason.
  """
  workdir = pathlib.Path(workdir)
  # many processes may try at once, on hosts that number them alike
  probe = workdir / f'.probe-{os.urandom(8).hex()}'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe.write_text('x')
    probe.unlink()
  except OSError as error:
    raise PermissionError(
      f'cannot write in the {flag} {workdir}: {error.strerror}; give another '
      f'one with --{flag}'
    ) from error


class Checkpoints:
  """The checkpoints of one workdir, written in the background.

  Each holds the train state, the position in the data and the config.
  """

  def __init__(
    self,
    workdir,
    config,
    say: Callable[[str], None] = print,
    flag: str = 'workdir',
  ):
    """Opens `workdir/checkpoints`.

    Args:
      workdir: of the run.
      config: ConfigDict of the run; reads `checkpoint.keep` and, if they are
        there, `checkpoint.keep_every` and `checkpoint.keep_best`.
      say: what to tell the user, a line at a time.
      flag: the folder's on the command line, for messages.
    """
    damage.silence_stack_traces()
    self._folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self._config = common.plain(config)
    self._say, self._flag = say, flag
    self._saving: int | None = None
    for name in damage.unfinished(self._folder):
      say(f'checkpoint {name} was interrupted while it was saved: left out')
    options = ocp.CheckpointManagerOptions(
      preservation_policy=_kept(config.checkpoint),
      # Without one of its own the manager does not write values down.
      best_fn=_bits if config.checkpoint.get('keep_best', 0) else None,
      best_mode='min',
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def steps(self) -> list[int]:
    """Steps of the checkpoints that are complete."""
    return list(self._manager.all_steps())

  def save(self, step: int, state, data, bits: float | None = None) -> None:
    """Starts to save; the arrays are copied before this returns.

    Args:
      step: the state's.
      state: a NamedTuple of pytrees, such as TrainState.
      data: iterator of the training data, after the batch of this step.
      bits: per byte on validation; None where it was not evaluated.

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
    known = bits is not None and math.isfinite(bits)
    metrics = {'bits_per_byte': bits} if known else None
    self._guard(lambda: self._manager.save(step, args=args, metrics=metrics))

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
        self._delete(other, functools.partial(self._manager.delete, other))
    damaged = self._folder.parent / 'damaged'
    if damaged.exists():
      self._delete('damaged', functools.partial(shutil.rmtree, damaged))

  def _delete(self, what: int | str, delete: Callable[[], object]) -> None:
    try:
      delete()
    except (OSError, ValueError) as error:
      raise CheckpointError(
        f'checkpoint {what} could not be deleted from {self._folder}: {error}; '
        'the same command goes on with it'
      ) from error

  def abandon(self) -> None:
    """Makes `close` wait for nothing: other processes may be gone."""
    self._manager = None

  def close(self) -> None:
    """Waits for what is being saved; raises a CheckpointError if it fails."""
    if self._manager is not None:
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
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))

    def read(step: int):
      # What one process cannot read, all leave out.
      with distributed.together():
        about = _about(self._manager, step)
        _check_config(
          about['config'], self._config, self._folder / str(step), self._flag
        )
        position = _position(self._folder / str(step) / 'data')
        found = self._manager.restore(step, args=args)
        fingerprints.check(about['fingerprints'], found.state._asdict())
        return found.state, position

    steps = json.loads(distributed.told(json.dumps(self.steps())))
    step, found, damaged = damage.newest_readable(
      self._folder, steps, read, self._say
    )
    if step is None:
      return None
    state, position = found
    try:
      data.set_state(position)
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
    distributed.told('')
    self._manager.reload()


def load_params(
  workdir,
  abstract: Callable[[dict], Any],
  say: Callable[[str], None] = print,
):
  """Loads the parameters alone from the newest readable checkpoint.

  Args:
    workdir: of a run, or the folder of one of its checkpoints.
    abstract: from the config (a plain dict) to the parameters' shapes and
      shardings, unboxed.
    say: what to tell the user, a line at a time.

  Returns:
    The step, the config as a plain dict, the parameters.

  Raises:
    FileNotFoundError: if there is no checkpoint.
    CheckpointError: if there are checkpoints and none can be read.
  """
  found = load_parts(workdir, lambda c, _: {'params': abstract(c)}, say)
  return found.step, found.config, found.parts['params']


class Found(NamedTuple):
  """Parts of a checkpoint; `position` reads where the data stood."""

  step: int
  config: dict
  parts: dict[str, Any]
  position: Callable[[], dict]


def load_parts(
  workdir,
  abstract: Callable[[dict, Callable[[], dict]], dict[str, Any]],
  say: Callable[[str], None] = print,
) -> Found:
  """Loads parts of the newest readable checkpoint, each of them whole.

  Args:
    workdir: of a run, or the folder of one of its checkpoints.
    abstract: from the config, and what reads the position, to shapes and
      shardings of the parts, by the names of the fields of what was saved;
      nothing for the config and the position alone.
    say: what to tell the user, a line at a time.

  Raises:
    FileNotFoundError: if there is no checkpoint.
    CheckpointError: if there are checkpoints and none can be read.
  """
  damage.silence_stack_traces()
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
  if not steps and _is_checkpoint(folder.parent):
    folder, steps = folder.parents[1], [int(folder.parent.name)]
  if not steps:
    raise FileNotFoundError(f'no checkpoint in {folder}: train there first')
  options = ocp.CheckpointManagerOptions(read_only=True)
  with ocp.CheckpointManager(folder, options=options) as manager:

    def read(step: int):
      about = _about(manager, step)
      position = functools.partial(_position, folder / str(step) / 'data')
      item = abstract(about['config'], position)
      if not item:
        return about['config'], {}, position
      restore = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
      )
      found = manager.restore(step, args=ocp.args.Composite(state=restore))
      fingerprints.check(about['fingerprints'], found.state)
      return about['config'], found.state, position

    step, found, _ = damage.newest_readable(folder, steps, read, say)
  return Found(step, *found)


def _is_checkpoint(folder: pathlib.Path) -> bool:
  named = folder.name.isdigit() and folder.parent.name == 'checkpoints'
  return named and folder.is_dir()


def _check_config(
  there: dict, here: dict, path: pathlib.Path, flag: str
) -> None:
  lines = common.differing(there, here)
  if lines:
    raise OtherConfigError(
      f'the checkpoint {path} was written by another config: '
      f'{"; ".join(lines)}. Give the values it was written with, or another '
      f'--{flag}.'
    )


def _about(manager: ocp.CheckpointManager, step: int) -> dict:
  args = ocp.args.Composite(about=ocp.args.JsonRestore())
  return manager.restore(step, args=args).about


def _position(folder: pathlib.Path) -> dict:
  """Joins the places in the data that the processes have saved."""
  paths = sorted(folder.glob('process_*-of-*.json'))
  wanted = {int(path.stem.split('-of-')[1]) for path in paths}
  if wanted != {len(paths)}:
    raise ValueError(f'its data position is in {len(paths)} files of {wanted}')
  return shards.join([json.loads(path.read_text()) for path in paths])


def _kept(config) -> managers.PreservationPolicy:
  """Which checkpoints stay, of `config.checkpoint`."""
  policies = [managers.LatestN(config.keep)]
  if every := config.get('keep_every', 0):
    policies.append(managers.EveryNSteps(every))
  if best := config.get('keep_best', 0):
    policies.append(
      managers.BestN(
        get_metric_fn=_bits,
        reverse=True,  # the last of the order are the best
        n=best,
        keep_checkpoints_without_metrics=False,
      )
    )
  return managers.AnyPreservationPolicy(policies)


def _bits(metrics: dict[str, float]) -> float:
  return metrics['bits_per_byte']
