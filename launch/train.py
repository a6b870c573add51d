"""Trains a model: `nestax-train --config=tiny --workdir=runs/mine`.

Any key can be set (`--config.opt.lr=1e-3`); the same command again goes on.
On several hosts: once on each, with `--distributed` or `--coordinator`,
`--processes` and `--process`.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from nestax.launch import (
  checkpoint,
  command,
  distributed,
  last_words,
  lock,
  run,
)

_NAME = 'nestax-train'
# Its own, so that `--help` lists these and no others.
FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  'config', None,
  'Name of a config, see above, or its file; quickstart if not given.',
  flag_values=FLAGS,
)  # fmt: skip
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; ./runs/<config.name> if not given.',
  flag_values=FLAGS,
)  # fmt: skip
_JOB = distributed.define(FLAGS)


def main(argv: list[str]) -> int:
  """Trains; returns 0, or 1 for a run that failed, 2 for a refused one."""
  if len(argv) > 1:
    return _say(f'unexpected argument {argv[1]!r}', 2)
  job, workdir = _JOB(), _WORKDIR.value or f'runs/{_CONFIG.value.name}'
  with last_words.witnessed(_NAME, workdir, wanted=distributed.several(job)):
    code = _train(job, workdir)
  if code in (1, 2):
    distributed.leave(code)  # the others may not know that it failed
  return code


def _train(job: distributed.Job, workdir: str) -> int:
  try:
    distributed.join(job)
    with distributed.together():
      plan = run.prepare(_CONFIG.value, workdir)
  except (ValueError, OSError, distributed.Elsewhere) as error:
    return _say(error, 2)
  try:
    run.train(plan)
  except run.Interrupted as stop:
    return _say(stop, stop.exit_code)
  except (
    lock.InUse, distributed.Elsewhere, checkpoint.OtherConfigError
  ) as error:  # fmt: skip
    return _say(error, 2)
  except distributed.Lost as error:
    return _say(f'{error}; {last_words.stand(workdir)}', 1)
  except (*run.FAILURES, OSError) as error:
    return _say(error, 1)
  return 0


def _say(words: object, code: int) -> int:
  print(f'{_NAME}: {words}', file=sys.stderr, flush=True)
  return code


def cli() -> None:
  parse = command.parser(_NAME, __doc__, FLAGS, 'quickstart')
  app.run(main, flags_parser=parse)


if __name__ == '__main__':
  cli()
