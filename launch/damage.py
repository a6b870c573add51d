"""What can be wrong with checkpoints, in words, and what is read in spite."""

import functools
import logging
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging as absl_logging


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written, or none of those there can be read."""


class OtherConfigError(CheckpointError):
  """The checkpoint was written by a run of another config."""


def newest_readable(
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


def unfinished(folder: pathlib.Path) -> list[str]:
  """Names of the checkpoints whose saving did not come to its end."""
  mark = '.orbax-checkpoint-tmp'
  if not folder.is_dir():
    return []
  return [p.name.split('.')[0] for p in folder.iterdir() if mark in p.name]


def _not_of_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in record.pathname


def _not_of_a_future(record: logging.LogRecord) -> bool:
  words = 'exception was never retrieved|Task was destroyed but it is pending'
  return not re.search(words, record.getMessage())


def silence_stack_traces() -> None:
  """Keeps to words what is raised anyway and told in words.

  For one error Orbax logs ten stack traces, and the reads and writes it leaves
  unfinished say more when they are collected.
  """
  absl_logging.get_absl_logger().addFilter(_not_of_orbax)
  logging.getLogger('asyncio').addFilter(_not_of_a_future)
  # Writes that had not begun when one of them failed.
  warnings.filterwarnings(
    'ignore', r"coroutine 'async_serialize_from_host.*never awaited"
  )
  hook = sys.unraisablehook
  if getattr(hook, 'func', None) is not _unless_of_orbax:
    sys.unraisablehook = functools.partial(_unless_of_orbax, hook)


def _unless_of_orbax(hook, unraisable) -> None:
  frames = traceback.extract_tb(unraisable.exc_traceback)
  if not any(re.search('/(orbax|asyncio)/', f.filename) for f in frames):
    hook(unraisable)
