"""lm-eval's command line, our models included: `nestax-lm-eval --help`.

Everything is as `lm-eval` has it; `--model nestax` is what it does not know:

    nestax-lm-eval run --model nestax --model_args workdir=runs/quickstart \\
      --tasks my_task --include_path my_tasks
"""

import importlib
import sys


def cli() -> None:
  """Registers the model class, then leaves everything to lm-eval."""
  try:
    # first: it says how to install what is missing
    importlib.import_module('nestax.launch.evals.harness')
    from lm_eval.__main__ import cli_evaluate
  except ImportError as error:
    print(f'nestax-lm-eval: {error}', file=sys.stderr)
    sys.exit(2)
  cli_evaluate()


if __name__ == '__main__':
  cli()
