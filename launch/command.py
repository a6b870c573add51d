"""Command lines of programs whose flags are their own."""

import sys
from collections.abc import Callable

from absl import flags

from nestax.launch.configs import common


def parser(
  name: str, words: str, values: flags.FlagValues, config: str = ''
) -> Callable[[list[str]], list[str]]:
  """Makes what `absl.app.run` takes as its `flags_parser`.

  It ends the process with 0 after `--help`, and with 2 for a wrong flag.

  Args:
    name: of the command, before what it says on stderr.
    words: what it does, above the list of its flags.
    values: its flags; not absl's, so that commands can be imported together.
    config: name of the config that `--config` is by default, if it has one.
  """

  def parse(argv: list[str]) -> list[str]:
    if '--help' in argv:
      print(f'{words}\n{values.get_help()}')
      sys.exit(0)
    try:
      flags.FLAGS(argv[:1])  # absl's own, at their defaults
      if config:
        return common.parse_flags(argv, values, config)
      rest = values(argv)
    except (flags.Error, common.FlagsError) as error:
      print(f'{name}: {error}', file=sys.stderr)
      sys.exit(2)
    common.quiet()
    return rest

  return parse
