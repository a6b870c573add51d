"""What kept a config from being read, in words instead of a traceback."""

import inspect
import os
import pathlib
import re
import traceback

import ml_collections
from absl import flags
from ml_collections.config_flags import config_flags

# Files whose errors put another one into their words.
_WRAPPERS = inspect.getfile(flags.Flag), config_flags.__file__
_COLLECTIONS = os.path.join(os.path.dirname(ml_collections.__file__), '')
# How a ConfigDict says that it has no such key, to who sets it or reads it.
_NO_KEY = re.compile(r'Key "(.*?)" does not exist|\'([^\']*)\'(?:\n|$)')
_MEANT = re.compile(r'Did you mean "(.*?)" instead of')


def words(error: Exception) -> str | None:
  """What an error of a command line says; for a config file's own, where.

  ml_collections puts a file's traceback into a message, absl that message into
  another: what the file raised is the context of both. Where the file raised it
  because of another, that is told too, unless by `raise ... from None`.

  Args:
    error: raised when flags with a config among them were read.

  Returns:
    None for an error that is neither the command line's nor the file's.
  """
  cause: BaseException = error
  while _frames(cause)[-1].filename in _WRAPPERS and _before(cause):
    cause = _before(cause)
  if str(cause).startswith('--config='):  # in words of ours
    return str(cause)
  if _places(cause):
    return _told(cause)
  if isinstance(cause, SyntaxError) and cause.filename:
    where = _place(cause.filename, cause.lineno)
    return f'{where}: {type(cause).__name__}: {cause.msg}'
  if isinstance(error, AttributeError | KeyError):
    return _unknown(error)
  if not isinstance(error, flags.Error | OSError | TypeError | ValueError):
    return None
  if cause is error or _frames(cause)[0].filename != config_flags.__file__:
    return str(error)
  return f'{_flag(error)}: {cause}'  # get_config called as it cannot be


def _before(error: BaseException) -> BaseException | None:
  return error.__cause__ or error.__context__


def _flag(error: Exception) -> str:
  """The flag and its value, if absl says them."""
  if not isinstance(error, flags.Error):
    return '--config'
  return str(error).removeprefix('flag ').removesuffix(f': {error.__context__}')


def _unknown(error: Exception) -> str:
  if "no attribute 'get_config'" in str(error):
    return (
      'the file that --config names has no function get_config, which gives '
      'the config'
    )
  return _no_key(error) or f'unknown key of the config: {error}'


def _no_key(error: BaseException) -> str | None:
  """What a ConfigDict raises for a key that it lacks, without its fields."""
  while error.args and isinstance(error.args[0], KeyError):
    error = error.args[0]  # an AttributeError, sometimes wrapped twice
  said = str(error.args[0]) if error.args else ''
  found, meant = _NO_KEY.match(said), _MEANT.search(said)
  if not found:
    return None
  key = found[1] or found[2]
  hint = f'; did you mean {meant[1]!r}?' if meant else ''
  return f'unknown key of the config: {key!r}{hint}'


def _told(error: BaseException) -> str:
  said = f'{type(error).__name__}: {error}'
  reason = error.__cause__
  if not error.__suppress_context__:
    reason = error.__context__
  if _by_collections(error):
    if isinstance(error, AttributeError | KeyError):
      said = _no_key(error) or said
    while reason and _by_collections(reason):  # the same in other words
      reason = _before(reason)
  places = _places(error) or _outside(_frames(error))[-1:]
  if places:  # a cause need not have been raised
    # the file's own line, then the one that it came to
    file, last = places[0].filename, places[-1]
    lines = [[x for x in places if x.filename == file][-1]]
    lines += [last] if last.filename != file else []
    where = [_place(x.filename, x.lineno) for x in lines]
    said = f'{", in ".join(where)}: {said}'
  return said if reason is None else f'{said} (because of {_told(reason)})'


def _by_collections(error: BaseException) -> bool:
  """Whether a ConfigDict raised it, not the lines that used one."""
  frames = _frames(error)
  return bool(frames) and frames[-1].filename.startswith(_COLLECTIONS)


def _place(file: str, line: int | None) -> str:
  return f'{pathlib.Path(file).name}, line {line}'


def _places(error: BaseException) -> list[traceback.FrameSummary]:
  """Where in the config's file an error was, and from there on."""
  frames = _frames(error)
  loaders = [
    i for i, x in enumerate(frames) if x.filename == config_flags.__file__
  ]
  if not loaders:
    return []
  below = [
    x
    for x in frames[loaders[-1] + 1 :]
    if not x.filename.startswith('<frozen importlib')
  ]
  if below and below[0].filename.startswith(_COLLECTIONS):
    return []
  return _outside(below)


def _outside(frames):
  """The frames that are not ml_collections' own."""
  return [x for x in frames if not x.filename.startswith(_COLLECTIONS)]


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
  return list(traceback.extract_tb(error.__traceback__))
