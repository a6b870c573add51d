"""What is said where a device has no room."""

import contextlib
import re
from collections.abc import Callable, Iterator

import jax


class OutOfMemory(RuntimeError):
  """A device has no room for what is wanted at once."""


def full(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether a device's memory was too small, so that less at once could do."""
  return 'RESOURCE_EXHAUSTED' in str(error) and not _shared(str(error))


def _shared(words: str):
  """What a kernel asked of a multiprocessor's own memory, and what is there."""
  return re.search(r'[Ss]hared memory.*? (\d+), available: (\d+)', words)


@contextlib.contextmanager
def in_words(
  say: Callable[[str], str], memory: str = 'memory'
) -> Iterator[None]:
  """Says what would take less, in place of a device's own error.

  Args:
    say: gives the words, from `, 3.2 GiB at once` or nothing.
    memory: where the memory's options are set; '' where they cannot be.

  Raises:
    OutOfMemory: for what does not fit.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    words = str(error)
    if 'RESOURCE_EXHAUSTED' not in words:
      raise
    shared = _shared(words)
    if shared:
      does = memory and f': {memory}.implementation=scan does without'
      raise OutOfMemory(
        f"a kernel asks for {shared[1]} bytes of a multiprocessor's shared "
        f'memory, of which this GPU has {shared[2]}{does}'
      ) from error
    raise OutOfMemory(say(_at_once(words))) from error


def wanted(
  what: str, less: str = '', memory: str = ''
) -> contextlib.AbstractContextManager:
  """`in_words`, of what is wanted and, where there is such, what takes less."""
  less = less and f': less is needed by {less}'
  return in_words(
    lambda much: f'the device has no room for {what}{much}{less}', memory
  )


def _at_once(words: str) -> str:
  """Of the allocation that failed: allocators count in bytes or in GiB."""
  asked = re.search(r'allocat\w+ (\d+) ?bytes', words)
  if asked:
    return f', {int(asked[1]) / 2**30:.1f} GiB at once'
  asked = re.search(r'allocat\w+ (\d+\.\d+ ?[GM]iB)', words)
  return f', {asked[1]} at once' if asked else ''
