"""Signals that end a run: noted, agreed on by all processes, then obeyed."""

import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupted(Exception):
  """SIGTERM or SIGINT came; the run has been saved.

  Attributes:
    exit_code: 128 + the signal, what a shell reports for a process it ended:
      schedulers start such a job again.
  """

  def __init__(self, words: str, number: int):
    super().__init__(words)
    self.exit_code = 128 + number


class Signals:
  """Notes SIGTERM or SIGINT instead of dying of it; a second one kills.

  Attributes:
    received: the signal's number, 0 for none.
  """

  def __init__(self):
    self.received = 0
    self._before = {}

  def __enter__(self) -> 'Signals':
    # Only the main thread may set handlers; elsewhere (a notebook's helper
    # thread) signals keep their meaning.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *error) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _note(self, number, frame) -> None:
    self.received = number
    self.__exit__()


def agreed(received: int, number: int, every: int) -> int:
  """The signal that any process has noted; all must stop at the same step."""
  if jax.process_count() == 1:
    return received
  if number % every:
    return 0
  noted = multihost_utils.process_allgather(np.int32(received))
  return int(np.max(noted))
