"""Evaluates: a long text as a stream, or whole suites of tasks.

    nestax-evaluate --text=novel.txt --workdir=runs/learning
    nestax-evaluate --suite=formal,mad --workdir=runs/suite --models=hope

The first reads the text once each way that `--levels` names, the second trains
small models and scores them; each has its own flags.
"""

from absl import app

from nestax.launch import command
from nestax.launch.evals import novel_command, suites


def _suite(argv: list[str]) -> bool:
  words = [word.lstrip('-').partition('=')[0] for word in argv[1:]]
  return 'suite' in words


def main(argv: list[str]) -> int:
  """Evaluates; returns 0, or 2 if something asked for is not there."""
  return (suites if suites.FLAGS.is_parsed() else novel_command).main(argv)


def _parse(argv: list[str]) -> list[str]:
  asked, _ = command.split_help(argv, novel_command.FLAGS)
  if asked and not _suite(argv):
    print(f'{__doc__}\nWith --suite:\n\n{suites.__doc__}')
    print(f'{command.listed(suites.FLAGS)}\n\nWithout:\n')
  return (suites if _suite(argv) else novel_command).parse(argv)


def cli() -> None:
  app.run(main, flags_parser=_parse)


if __name__ == '__main__':
  cli()
