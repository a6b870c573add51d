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
def held(workdir, take: bool = True, flag: str = 'workdir') -> Iterator[None]:
  """Holds `workdir/.lock`; the system lets go of it however the process ends.

  Args:
    workdir: of the run; it is there.
    take: False on all processes of a run but the first, which take nothing.
    flag: that names it.

  Raises:
    InUse: naming the workdir.
  """
  if not take:
    yield
    return
  with free(pathlib.Path(workdir) / '.lock') as mine:
    if not mine:
      raise InUse(
        f'another run is going on in the {flag} {workdir}: wait for its end, '
        f'or give another one with --{flag}'
      )
    yield


@contextlib.contextmanager
def free(path: pathlib.Path, wait: bool = False) -> Iterator[bool]:
  """Holds the file `path`, made if it is not there, unless somebody else does.

  Gives whether it is held here, which with `wait` it is in the end.
  """
  with path.open('w') as file:
    mine = True
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      mine = False
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
    yield mine
