"""Checkpoints of a run: complete or absent, and the newest readable one."""

import functools
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from grain import checkpoint as grain_checkpoint

from nestax.launch.configs import common


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written, or none of those there can be read."""


class OtherConfigError(CheckpointError):
  """The checkpoint was written by a run of another config."""


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
    _silence_stack_traces()
    self._folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self._config = common.plain(config)
    self._say = say
    self._saving: int | None = None
    for name in _unfinished(self._folder):
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
      'fingerprints': fingerprints(state._asdict()),
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
        f'{reason(error)}. Earlier checkpoints are untouched ({kept}).'
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
      _check_fingerprints(about, found.state._asdict())
      return found.state

    step, state, damaged = _newest_readable(
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
  _silence_stack_traces()
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
      _check_fingerprints(about, found.state)
      return about['config'], found.state['params']

    step, (config, params), _ = _newest_readable(folder, steps, read, say)
  return step, config, params


@jax.jit
def _word_sums(parts):
  def words(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    if x.dtype == bool:
      return x.sum(dtype=jnp.uint32)
    word = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
    return jax.lax.bitcast_convert_type(x, word).sum(dtype=jnp.uint32)

  zero = jnp.zeros((), jnp.uint32)
  return {
    name: sum((words(x) for x in jax.tree.leaves(part)), start=zero)
    for name, part in parts.items()
  }


def fingerprints(parts: dict[str, Any]) -> dict[str, int]:
  """Adds up the bits of all arrays of each part, modulo 2**32.

  The same on every mesh. TensorStore keeps no checksum of array data: without
  this a flipped byte is restored as if nothing had happened.
  """
  return {k: int(v) for k, v in jax.device_get(_word_sums(parts)).items()}


def _check_fingerprints(about: dict, parts: dict[str, Any]) -> None:
  want = {name: about['fingerprints'][name] for name in parts}
  if fingerprints(parts) != want:
    raise CheckpointError('its numbers are not those that were saved')


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


def _newest_readable(
  folder: pathlib.Path,
  steps: Sequence[int],
  read: Callable[[int], Any],
  say: Callable[[str], None],
):
  """Reads the newest it can: its step, what was read, the steps skipped."""
  damaged: dict[int, str] = {}
  for step in sorted(steps, reverse=True):
    try:
      return step, read(step), list(damaged)
    except OtherConfigError:
      raise
    # Orbax, TensorStore and grain raise whatever the damage makes them trip
    # over, from KeyError to bare Exception.
    except Exception as error:
      damaged[step], cause = reason(error), error
      say(
        f'checkpoint {step} in {folder} cannot be read ({damaged[step]}): '
        'falling back to the one before'
      )
  if damaged:
    raise CheckpointError(
      f'none of the checkpoints {sorted(damaged)} in {folder} can be read; '
      'move the folder away to start from the beginning'
    ) from cause
  return None, None, []


def reason(error: Exception) -> str:
  """Puts an exception of the libraries below into a few words."""
  text = ' '.join(str(error).split())
  code = re.search(r"os_error_code='(\d+)'", text)
  if code:
    return os.strerror(int(code[1]))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return text if len(text) <= 120 else f'{text[:117]}...'


def _unfinished(folder: pathlib.Path) -> list[str]:
  mark = '.orbax-checkpoint-tmp'
  if not folder.is_dir():
    return []
  return [p.name.split('.')[0] for p in folder.iterdir() if mark in p.name]


def _not_of_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in record.pathname


def _not_of_a_future(record: logging.LogRecord) -> bool:
  return 'exception was never retrieved' not in record.getMessage()


def _silence_stack_traces() -> None:
  """Keeps to words what is raised anyway and told in words.

  For one error Orbax logs ten stack traces, and the reads it leaves unfinished
  say more when they are collected.
  """
  absl_logging.get_absl_logger().addFilter(_not_of_orbax)
  logging.getLogger('asyncio').addFilter(_not_of_a_future)
  hook = sys.unraisablehook
  if getattr(hook, 'func', None) is not _unless_of_orbax:
    sys.unraisablehook = functools.partial(_unless_of_orbax, hook)


def _unless_of_orbax(hook, unraisable) -> None:
  frames = traceback.extract_tb(unraisable.exc_traceback)
  if not any(re.search('/(orbax|asyncio)/', f.filename) for f in frames):
    hook(unraisable)
