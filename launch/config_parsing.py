"""Command lines whose `--config` is a config of ours or somebody's own file."""

import re

from absl import flags, logging

from nestax.launch import config_errors
from nestax.launch.configs import common


class FlagsError(ValueError):
  """The command line names a key, a value or a file that cannot be."""


def quiet() -> None:
  """Lowers the log to warnings.

  absl's programs talk at level INFO, and JAX then lists what it lacks.
  """
  logging.set_verbosity(logging.WARNING)


def parse_flags(
  argv: list[str],
  values: flags.FlagValues,
  default: str = 'quickstart',
) -> list[str]:
  """Parses a command line whose `--config` may be the bare name of a config.

  Args:
    argv: the command line.
    values: what its flags are defined in.
    default: name of the config where none is given.

  Returns:
    What is left after the flags, as absl's `flags.FLAGS` does.

  Raises:
    FlagsError: in words, for an unknown flag or key, a value of another type,
      a config file that is not there and whatever the file itself raises.
  """
  try:
    rest = values(_expand(argv, default))
    quiet()
    _check_whole(values['config'].value)
    return rest
  except Exception as error:
    words = config_errors.words(error)
    if words is None:
      raise
    lacks = re.fullmatch("unknown key of the config: '([^']*)'", words)
    raise FlagsError(words + meant(lacks[1] if lacks else '')) from error


def meant(word: str) -> str:
  """A hint: the keys whose last name a word is; '' if there are none."""
  found = [
    f'--config.{key}' for key in common.keys() if f'.{key}'.endswith(f'.{word}')
  ]
  if not word or not found:
    return ''
  return f'; keys of the config are set by {", ".join(found)}'


def _check_whole(config) -> None:
  """Refuses what is no config of ours, from a file of somebody's own."""
  begin = 'begin with common.defaults() or with the get_config of another'
  if not hasattr(config, 'to_dict'):  # raises what kept a file from loading
    raise FlagsError(
      f'get_config gives a {type(config).__name__}, no ConfigDict: {begin}'
    )
  there = common.flat(config.to_dict()).keys()
  lacking = [key for key in common.keys() if key not in there]
  if lacking:
    more = f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''
    raise FlagsError(
      f'the config has no {", ".join(lacking[:3])}{more}, which stand in '
      f'{common.__file__}: {begin}'
    )


def _expand(argv: list[str], default: str) -> list[str]:
  """Replaces a config's bare name on a command line by its path.

  Without a name it is the default's: one given to ml_collections would read
  the overrides before the command line is ours to parse.
  """
  words = argv[:1]
  if not any(word.split('=')[0] == '--config' for word in argv):
    words.append(f'--config={common.path(default)}')
  for word in argv[1:]:
    flag, equals, name = word.partition('=')
    if words[-1] == '--config':
      word = common.path(word)
    elif flag == '--config' and equals:
      word = f'{flag}={common.path(name)}'
    words.append(word)
  return words
