"""What is said of a process that could not say it itself.

When one process of a run dies, JAX ends the others from a thread of its own,
by abort and with a stack trace; a process that is killed says nothing at all.
So a run of several processes has a witness, forked before JAX has threads: it
waits for the end and speaks only if the run did not.
"""

import contextlib
import os
import pathlib
import signal
from collections.abc import Iterator

_WELL = b'.'


@contextlib.contextmanager
def witnessed(name: str, workdir, wanted: bool = True) -> Iterator[None]:
  """Has somebody say where a run stands if this process dies inside.

  Args:
    name: of the command and the process, before the words.
    workdir: of the run; its newest checkpoint is named.
    wanted: False for a run of one process, whose shell sees how it ends.
  """
  if not wanted:
    yield
    return
  ours, theirs = os.pipe()
  if os.fork() == 0:
    os.close(theirs)
    _witness(ours, name, workdir)
  os.close(ours)
  try:
    yield
  finally:  # however it ends, it ended in words
    with contextlib.suppress(BrokenPipeError):
      os.write(theirs, _WELL)
    os.close(theirs)


def _witness(pipe: int, name: str, workdir) -> None:
  """Waits for the end of the process that it was forked from, and ends."""
  try:
    # The run obeys these; who watches it stays until it is over.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      signal.signal(number, signal.SIG_IGN)
    if os.read(pipe, 1) != _WELL:
      words = (
        'this process was ended from outside: another process of the run has '
        'died or cannot be reached (JAX says more above), or it was killed '
        'itself'
      )
      os.write(2, f'{name}: {words}; {stand(workdir)}\n'.encode())
  finally:
    os._exit(0)


def stand(workdir) -> str:
  """Says from where the same command would go on."""
  folder = pathlib.Path(workdir) / 'checkpoints'
  there = folder.iterdir() if folder.is_dir() else ()
  steps = [int(path.name) for path in there if path.name.isdigit()]
  if not steps:
    return (
      'there is no checkpoint yet, and the same command on every host starts '
      'again'
    )
  return (
    f'checkpoint {max(steps)} in {folder} is complete, and the same command on '
    'every host goes on from there'
  )
