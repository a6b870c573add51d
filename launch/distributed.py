"""One run as several processes: how they meet, agree and part.

`nestax-train` is started once a host (or once a GPU), with the same command
but for `--process`; nothing here does anything in a run of one process.
"""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

# `--help` lists the flags of a job under the command that has them.
flags.disclaim_key_flags()


class Job(NamedTuple):
  """What the command line says of the processes; by default there is one."""

  coordinator: str | None = None  # HOST:PORT of process 0
  processes: int | None = None
  process: int | None = None
  detect: bool = False  # from the cluster's environment
  heartbeat: int = 30  # seconds without a sign of life until all are ended


class Elsewhere(RuntimeError):
  """Another process of the run failed; its words are in these."""


class Lost(RuntimeError):
  """Another process of the run has ended, or cannot be reached any more."""


def define(values: flags.FlagValues) -> Callable[[], Job]:
  """Defines the flags of a job; gives what reads them once they are parsed."""
  holders = (
    flags.DEFINE_string(
      'coordinator',
      None,
      'HOST:PORT of process 0, the same for all processes.',
      flag_values=values,
    ),
    flags.DEFINE_integer(
      'processes', None, 'How many processes the run has.', flag_values=values
    ),
    flags.DEFINE_integer(
      'process',
      None,
      'Number of this process among them, from 0.',
      flag_values=values,
    ),
    flags.DEFINE_bool(
      'distributed',
      False,
      'Take all three from the environment: TPU pods, Slurm, Open MPI, '
      'Kubernetes.',
      flag_values=values,
    ),
    flags.DEFINE_integer(
      'heartbeat',
      Job().heartbeat,
      'Seconds without a sign of life of one process until all are ended.',
      flag_values=values,
    ),
  )
  return lambda: Job(*(holder.value for holder in holders))


def several(job: Job) -> bool:
  """Whether a job may have more than one process."""
  return job.detect or job.coordinator is not None


def join(job: Job) -> None:
  """Makes this process part of a job; before anything asks for devices.

  Where the others do not come within five minutes, JAX ends the process
  itself (see last_words.py).

  Args:
    job: what was asked for; with nothing of it, this does nothing.

  Raises:
    ValueError: in words, for a job that cannot be.
    ConnectionError: if there is no cluster, or nothing to meet the others at.
  """
  check(job)
  if not several(job):
    return
  try:
    jax.distributed.initialize(
      job.coordinator,
      job.processes,
      job.process,
      # What is said by flags is not to be mixed with what a cluster says.
      cluster_detection_method=None if job.detect else 'deactivate',
      heartbeat_timeout_seconds=job.heartbeat,
      shutdown_timeout_seconds=job.heartbeat,
    )
  # JAX raises ValueError for what it did not detect, RuntimeError for an
  # address that cannot be had, and a cluster's library whatever it likes.
  except Exception as error:
    raise ConnectionError(_not_joined(job, error)) from error


def check(job: Job) -> None:
  """Raises a ValueError for flags that do not go together."""
  given = {
    '--coordinator': job.coordinator,
    '--processes': job.processes,
    '--process': job.process,
  }
  missing = [name for name, value in given.items() if value is None]
  if job.heartbeat < 5:
    raise ValueError(
      f'--heartbeat={job.heartbeat}: it has to be at least 5 seconds'
    )
  if job.detect and len(missing) < 3:
    raise ValueError(
      '--distributed takes the processes from the environment: give it alone, '
      f'or {", ".join(given)} without it'
    )
  if len(missing) == 3:
    return
  if missing:
    raise ValueError(
      f'{" and ".join(missing)} missing: a run of several processes takes '
      '--coordinator=HOST:PORT --processes=N --process=I, or --distributed'
    )
  host, _, port = job.coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
    raise ValueError(
      f'--coordinator={job.coordinator}: it has to be HOST:PORT, such as '
      '10.0.0.1:8476'
    )
  if not 0 <= job.process < job.processes:
    raise ValueError(
      f'--process={job.process} of --processes={job.processes}: processes are '
      'numbered from 0'
    )


def _not_joined(job: Job, error: Exception) -> str:
  why = ' '.join(str(error).split())[:200].rstrip('.')
  if job.detect:
    return (
      '--distributed: no cluster in the environment that JAX knows (TPU pod, '
      f'Slurm, Open MPI, Kubernetes): {why}. Give --coordinator=HOST:PORT '
      '--processes=N --process=I'
    )
  return (
    f'process {job.process} of {job.processes} did not meet the others at '
    f'{job.coordinator}: {why}'
  )


def gather(words: str) -> list[str]:
  """What each process says, in their order; all have to call this."""
  if jax.process_count() == 1:
    return [words]
  said = np.frombuffer(words.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(said.size))
  padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
  padded[: said.size] = said
  rows = multihost_utils.process_allgather(padded)
  return [bytes(row[:size]).decode() for row, size in zip(rows, sizes)]


def told(words: str) -> str:
  """What process 0 says; also a place where all wait for one another."""
  return gather(words if jax.process_index() == 0 else '')[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Does what is inside on all processes, or fails on all.

  Raises:
    Elsewhere: where it went well and another process failed.
  """
  failed = None
  try:
    yield
  except Exception as error:
    failed = error
  said = gather('' if failed is None else str(failed) or repr(failed))
  if failed is not None:
    raise failed
  words = next((f'process {i}: {w}' for i, w in enumerate(said) if w), None)
  if words:
    raise Elsewhere(words)


def check_shared(workdir: pathlib.Path) -> None:
  """Checks that all processes see one and the same folder.

  Raises:
    OSError, Elsewhere: naming it.
  """
  if jax.process_count() == 1:
    return
  first = jax.process_index() == 0
  # A name that is new to every host: file systems remember what was not there.
  name = f'.shared-{os.urandom(8).hex()}'
  if first:
    (workdir / name).touch()
  path = workdir / told(name)
  with together():
    if not path.exists():
      raise OSError(
        f'the workdir {workdir} is another folder here than on the host of '
        'process 0: give one on a file system that all hosts share'
      )
  if first:
    path.unlink()


@contextlib.contextmanager
def others_needed() -> Iterator[None]:
  """Says in words what JAX raises when a process has gone.

  Raises:
    Lost: in a run of several processes.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    why = ' '.join(str(error).split())[:300]
    raise Lost(
      f'process {jax.process_index()} of {jax.process_count()} cannot go on '
      f'with the others: {why}'
    ) from error


def leave(code: int) -> None:
  """Ends this process now if it is one of several, waiting for none.

  An orderly end would wait for the others, who may wait for this one.
  """
  if not jax.distributed.is_initialized():
    return
  sys.stdout.flush()
  sys.stderr.flush()
  if jax.process_index() == 0:
    time.sleep(2)  # JAX ends the others when it is gone: let them speak first
  os._exit(code)
