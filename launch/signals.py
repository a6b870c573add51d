"""Signals that end a run: noted, agreed on by all processes, then obeyed."""

import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


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


class Agreement:
  """The signal that any process has noted, known to all at the same call.

  All processes have to make the same calls. In a run of several the answer is
  that to the call before: it travels while the devices are busy, and nobody
  waits for it.
  """

  def __init__(self, mesh: Mesh):
    self._mesh, self._late = mesh, None
    everywhere = NamedSharding(mesh, PartitionSpec())
    self._max = jax.jit(jnp.max, out_shardings=everywhere)

  def __call__(self, received: int) -> int:
    """Gives the number of a signal, 0 for none."""
    if jax.process_count() == 1:
      return received
    each = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    noted = jax.make_array_from_callback(
      (self._mesh.size,), each, lambda index: np.full(1, received, np.int32)
    )
    late, self._late = self._late, self._max(noted)
    return 0 if late is None else int(late)
