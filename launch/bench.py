"""Times parts of nestax beside their peers: `nestax-bench NAME --help`."""

import importlib
import sys

from absl import flags

from nestax.launch import command, mesh, room

# A module of this name in `launch/benches` has `FLAGS` and `main() -> None`.
NAMES = ('optim', 'kernel', 'step', 'decode', 'fits')


def main(argv: list[str]) -> int:
  """Runs a benchmark; returns 0, or 2 if what is asked for cannot be."""
  if argv[1:2] and argv[1] not in NAMES:
    asked, argv = command.split_help(argv, flags.FlagValues())
    if asked:
      print(_help())
      return 0
  name = argv[1] if len(argv) > 1 else ''
  if name not in NAMES:
    return _refuse(f'{name!r} is no benchmark: give one of {", ".join(NAMES)}')
  module = _module(name)
  asked, argv = command.split_help(argv[1:], module.FLAGS)
  if asked:
    print(f'{module.__doc__}\n{command.listed(module.FLAGS)}')
    return 0
  mesh.spare_threads()
  try:
    for flag in module.FLAGS:  # of an earlier call
      module.FLAGS[flag].unparse()
    rest = module.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f'unexpected argument {rest[1]!r}')
    with room.wanted('what is timed', 'smaller values of its flags (--help)'):
      module.main()
  except (flags.Error, ValueError, OSError, room.OutOfMemory) as error:
    return _refuse(error)
  return 0


def _module(name: str):
  return importlib.import_module(f'nestax.launch.benches.{name}')


def _help() -> str:
  """The benchmarks, a line each: the first of their docstrings."""
  lines = [f'  {n:8}{_module(n).__doc__.partition(chr(10))[0]}' for n in NAMES]
  return '\n'.join([__doc__, '', *lines])


def _refuse(error: object) -> int:
  print(f'nestax-bench: {error}', file=sys.stderr)
  return 2


def cli() -> None:
  sys.exit(main(sys.argv))


if __name__ == '__main__':
  cli()
