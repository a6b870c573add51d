"""Runs evaluations: `nestax-evaluate --suite=NAME,... --workdir=W`.

Small models of the named families are trained at every learning rate and seed
(formal, mad, mqar, needle; language on the user's text), or trained ones read
(needle: folders of runs, pretrained files). Others read the user's own files,
with trained models only: arc, babilong, incorporation, incremental,
translation; each module says how. A model may have keys set:
`hope:memory.eta_max=1.0`; with a comma inside, put it in double quotes. W gets
table.md, beside the paper's rows where it has them, results.jsonl, a line a
cell, and NAME.png.

The same command goes on where it stopped. Started more than once it shares the
cells: of several GPUs, or of machines with one file system that has locks, each
process does what no other is at, and takes over what one leaves when it ends.
Each writes the table of all that is done by then; --models and --tasks may
differ.
`--set=mad.shrink=8`, `--set=formal.train.D=32` and the like change what stands
in the Options of launch/evals/NAME.py.
"""

import pathlib
import sys

from absl import flags

from nestax.launch import checkpoint, command, room
from nestax.launch.evals import (
  arc,
  babilong,
  formal,
  incorporation,
  incremental,
  language,
  mad,
  mqar,
  needle,
  running,
  scoreboard,
  suite,
  translation,
)

GENERATED = (formal, mad, mqar, needle)
FROM_FILES = (
  arc,
  babilong,
  incorporation,
  incremental,
  language,
  translation,
)
EVALUATIONS = {
  module.EVALUATION.name: module.EVALUATION
  for module in (*GENERATED, *FROM_FILES)
}
_LESS = (
  'smaller batches or shorter texts, where the evaluation has an option for '
  'them (--set)'
)
# Its own, so that the module can be imported beside the commands.
FLAGS = flags.FlagValues()


def _flag(define, name, default, words, **options):
  return define(name, default, words, flag_values=FLAGS, **options)


_SUITE = _flag(
  flags.DEFINE_list, 'suite', [],
  f'Evaluations to run, of {", ".join(EVALUATIONS)}; '
  'all: those that need no files.',
)  # fmt: skip
_WORKDIR = _flag(
  flags.DEFINE_string, 'workdir', 'runs/suite',
  'Folder of the results; what it holds is not done again.',
)  # fmt: skip
_MODELS = _flag(
  flags.DEFINE_list, 'models', ['hope', 'transformer'],
  'Families to train, folders of runs or pretrained files, see above.',
)  # fmt: skip
_TASKS = _flag(
  flags.DEFINE_list, 'tasks', [],
  'Tasks of the evaluations to do, in double quotes where a comma is in the '
  'name; all if not given.',
)  # fmt: skip
_SEEDS = _flag(
  flags.DEFINE_integer, 'seeds', 3,
  'Seeds that each model is trained or asked with.',
  lower_bound=1,
)  # fmt: skip
_STEPS = _flag(
  flags.DEFINE_integer, 'steps', 0,
  "Training steps; 0: as many as the evaluation's own options say.",
  lower_bound=0,
)  # fmt: skip
_RATES = _flag(
  flags.DEFINE_list, 'rates', [],
  "Learning rates to try; the evaluation's own if not given.",
)  # fmt: skip
_SET = _flag(
  flags.DEFINE_multi_string, 'set', [],
  'Another option of an evaluation, NAME.KEY=VALUE, see above',
)  # fmt: skip

parse = command.parser('nestax-evaluate', __doc__, FLAGS)


def choose(names: list[str]) -> list[suite.Evaluation]:
  """The evaluations of these names.

  Raises:
    ValueError: for one that there is not, or none.
  """
  if names == ['all']:
    return [module.EVALUATION for module in GENERATED]
  for name in names or ['']:
    if name not in EVALUATIONS:
      raise ValueError(f'--suite={name}: of {", ".join(EVALUATIONS)}, or all')
  return [EVALUATIONS[name] for name in dict.fromkeys(names)]


def _rates(words: list[str]) -> tuple[float, ...]:
  try:
    return tuple(float(word) for word in words)
  except ValueError:
    raise ValueError(
      f'--rates={",".join(words)}: numbers with commas between'
    ) from None


def main(argv: list[str]) -> int:
  """Evaluates and reports; returns 0, or 2 for what cannot be done."""
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    evaluations = suite.configure(choose(_SUITE.value), _SET.value)
    workdir = pathlib.Path(_WORKDIR.value)
    asked = suite.Asked(
      tuple(_MODELS.value),
      _SEEDS.value,
      _STEPS.value,
      _rates(_RATES.value),
      tuple(_TASKS.value),
      workdir,
    )
    with room.wanted('what is evaluated', _LESS, 'memory'):
      rows = running.run(evaluations, asked)
    print(scoreboard.write(evaluations, workdir, rows))
  except (
    ValueError, OSError, ImportError, room.OutOfMemory,
    checkpoint.CheckpointError,
  ) as e:  # fmt: skip
    print(f'nestax-evaluate: {e}', file=sys.stderr)
    return 2
  return 0
