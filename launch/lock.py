"""One run at a time in a workdir."""

import contextlib
import errno
import fcntl
import pathlib
from collections.abc import Iterator

# File systems that know no locks: there a run goes on without one.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUse(OSError):
  """Another run that has not ended has the workdir."""


@contextlib.contextmanager
def held(workdir, take: bool = True) -> Iterator[None]:
  """Holds `workdir/.lock`; the system lets go of it however the process ends.

  Args:
    workdir: of the run; it is there.
    take: False on all processes of a run but the first, which take nothing.

  Raises:
    InUse: naming the workdir.
  """
  if not take:
    yield
    return
  with (pathlib.Path(workdir) / '.lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InUse(
        f'another run is going on in the workdir {workdir}: wait for its end, '
        'or give another one with --workdir'
      ) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
    yield
