"""Command lines of programs whose flags are their own."""

import itertools
import re
import sys
import textwrap
from collections.abc import Callable

from absl import flags

from nestax.launch import config_parsing, mesh
from nestax.launch.configs import common, sizes
from nestax.models import config as models

# What Python and absl say of a value of another type, and what it means.
_WANTED = {
  r'invalid literal for int\(\)': 'a whole number is wanted',
  'could not convert string to float': 'a number is wanted',
  r"\('Non-boolean argument": 'True or False is wanted',
}


def parser(
  name: str, words: str, values: flags.FlagValues, config: str = ''
) -> Callable[[list[str]], list[str]]:
  """Makes what `absl.app.run` takes as its `flags_parser`.

  It ends the process with 0 after `--help`, and with 2 for a wrong flag. The
  help of a command with a config also says which configs there are.

  Args:
    name: of the command, before what it says on stderr.
    words: what it does, above the list of its flags.
    values: its flags; not absl's, so that commands can be imported together.
    config: name of the config that `--config` is by default, if it has one.
  """

  def parse(argv: list[str]) -> list[str]:
    asked, argv = split_help(argv, values)
    if asked:
      print(f'{words}\n{configs() if config else ""}{listed(values)}')
      sys.exit(0)
    mesh.spare_threads()
    try:
      flags.FLAGS(argv[:1])  # absl's own, at their defaults
      if config:
        return config_parsing.parse_flags(argv, values, config)
      rest = values(argv)
    except (flags.Error, config_parsing.FlagsError) as error:
      print(f'{name}: {_said(error, bool(config))}', file=sys.stderr)
      sys.exit(2)
    config_parsing.quiet()
    return rest

  return parse


def _said(error: Exception, has_config: bool) -> str:
  """The error of a command line, with what would be right where that shows."""
  words = str(error)
  for theirs, wanted in _WANTED.items():
    words = re.sub(f'^(flag --.*?: ){theirs}.*', rf'\1{wanted}', words)
  cause = error.__cause__ or error
  if has_config and isinstance(cause, flags.UnrecognizedFlagError):
    words += config_parsing.meant(cause.flagname)
  return words


def split_help(
  argv: list[str], values: flags.FlagValues
) -> tuple[bool, list[str]]:
  """Takes what asks for help, or for none, out of a command line.

  The value of a flag does neither.

  Args:
    argv: the command line.
    values: its flags, which tell whether the next word is one's value.

  Returns:
    Whether help is asked for, and the line without those words.
  """
  asked, rest = False, argv[:1]
  words = iter(argv[1:])
  for word in words:
    asks = _asks(word)
    asked |= bool(asks)
    if asks is None:
      rest.append(word)
    name = word.lstrip('-')
    if word == '--':
      rest += words
    elif name != word and name in values and not values[name].boolean:
      rest += itertools.islice(words, 1)
  return asked, rest


def _asks(word: str) -> bool | None:
  """Whether a word asks for help or for none; None: it is about another thing.

  absl's flags may have one dash and a value.
  """
  name, given, value = word.partition('=')
  if word in ('-nohelp', '--nohelp'):
    return False
  if name in ('-help', '--help') and given:
    return value.lower() not in ('false', 'f', '0')
  return True if word in ('-h', '-help', '--help') else None


def listed(values: flags.FlagValues) -> str:
  """The flags with their words and defaults, without those of absl."""
  return values.get_help(include_special_flags=False)


def configs() -> str:
  """What `--config` may be, and where the keys of a config are explained."""
  names = common.names()
  sized = [name for name in names if name in models.FAMILIES]
  plain = [name for name in names if name not in sized]
  sizes_ = ', '.join(sizes.TRANSFORMERS)
  return '\n'.join(
    [
      'Configs that come along:',
      _wrapped(', '.join(plain)),
      f'With a size behind a colon, as in {sized[0]}:340m ({sizes_}):',
      _wrapped(', '.join(sized)),
      'Keys of a config, their defaults and what they may be:',
      f'  {common.__file__}',
      f'  {models.__file__} (those of config.model)',
      '',
    ]
  )


def _wrapped(words: str) -> str:
  return textwrap.fill(
    words, 80, initial_indent='  ', subsequent_indent='  ',
    break_on_hyphens=False,
  )  # fmt: skip
