"""lm-eval's command line, our models included: `nestax-lm-eval --help`.

Everything is as `lm-eval` has it; `--model nestax` is what it does not know:

    nestax-lm-eval run --model nestax --model_args workdir=runs/quickstart \\
      --tasks my_task --include_path my_tasks
"""

import importlib
import sys
from typing import NoReturn

from nestax.launch import room


def cli() -> None:
  """Registers the model class, then leaves everything to lm-eval.

  Ends with 2 where that class refuses what it is asked for; lm-eval's own
  errors are raised as they are.
  """
  try:
    # first: it says how to install what is missing
    ours = importlib.import_module('nestax.launch.evals.harness')
    from lm_eval.__main__ import cli_evaluate
  except ImportError as error:
    _refuse(error)
  try:
    with room.wanted('what is evaluated', 'a smaller --batch_size'):
      cli_evaluate()
  except (ours.Refused, room.OutOfMemory) as error:
    _refuse(error)


def _refuse(error: Exception) -> NoReturn:
  print(f'nestax-lm-eval: {error}', file=sys.stderr)
  sys.exit(2)


if __name__ == '__main__':
  cli()
