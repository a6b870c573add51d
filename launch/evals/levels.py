"""How much do levels help? `python -m nestax.launch.evals.levels --novel=B`.

A model with three levels is trained with none, one, two and three of them
learning inside a sequence, everything else equal, the fastest first; each then
reads a novel from end to end, its state carried along, as it was trained and
with the same weights frozen. With `--model=FILE` nothing is trained: the MLPs
of a pretrained Transformer become levels (`--stack`), and the inner rate is
the one that reads the beginning of `--tune=TEXT` best.

Each count of levels is a cell of its own in `W/cells`, so the same command
goes on where it stopped, and processes with other `--levels` may share W; the
last one to end writes the whole `table.md`.
"""

import functools
import os
import pathlib
import sys

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from nestax.launch import command, run, trained
from nestax.launch.configs import common
from nestax.launch.evals import novel, reading

# Its own, so that the module can be imported beside the commands.
FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  'config', None,
  'Config of the models to train, by name or file; novels if not given.',
  flag_values=FLAGS,
)  # fmt: skip
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/levels',
  'Folder of the results; what it holds is not done again.',
  flag_values=FLAGS,
)  # fmt: skip
_NOVEL = flags.DEFINE_string(
  'novel', None,
  'UTF-8 file to read from end to end.',
  flag_values=FLAGS, required=True,
)  # fmt: skip
_LEVELS = flags.DEFINE_list(
  'levels', ['0', '1', '2', '3'],
  'How many levels learn, several to compare.',
  flag_values=FLAGS,
)  # fmt: skip
_TOKENS = flags.DEFINE_integer(
  'tokens', 0,
  'Tokens of the novel to read, from its start; 0: all.',
  lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_WINDOW = flags.DEFINE_integer(
  'window', 4096,
  'Tokens that attention sees, the last ones.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_MODEL = flags.DEFINE_string(
  'model', None,
  'File of a pretrained model to use instead of training.',
  flag_values=FLAGS,
)  # fmt: skip
_STACK = flags.DEFINE_string(
  'stack', 'groups',
  'How the MLPs of a --model become levels: groups or copies.',
  flag_values=FLAGS,
)  # fmt: skip
_BLOCKS = flags.DEFINE_string(
  'blocks', 'all',
  'Blocks whose levels learn: all, last_quarter, or numbers such as 3,5.',
  flag_values=FLAGS,
)  # fmt: skip
_PERIODS = flags.DEFINE_list(
  'periods', ['128', '512', '2048'],
  'Tokens between commits of each stacked level, fastest first.',
  flag_values=FLAGS,
)  # fmt: skip
_RATES = flags.DEFINE_list(
  'rates', ['0.03', '0.1', '0.3'],
  'Inner learning rates of stacked levels, tried on the text of --tune.',
  flag_values=FLAGS,
)  # fmt: skip
_TUNE = flags.DEFINE_string(
  'tune', None,
  'Text file on which the best of --rates is found, for a --model.',
  flag_values=FLAGS,
)  # fmt: skip
_TUNE_TOKENS = flags.DEFINE_integer(
  'tune_tokens', 16_384,
  'Tokens of that text to read.',
  lower_bound=2, flag_values=FLAGS,
)  # fmt: skip
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'],
  'Type that a --model computes in.',
  flag_values=FLAGS,
)  # fmt: skip


def with_levels(
  config: ml_collections.ConfigDict, count: int
) -> ml_collections.ConfigDict:
  """The config with only its `count` fastest levels learning.

  The others stay where they are, as ordinary MLPs.

  Raises:
    ValueError: for a count that the config's periods do not have, or a config
      no level of which learns.
  """
  periods, blocks = config.model.cms.periods, config.model.cms.blocks
  if not 0 <= count <= len(periods):
    raise ValueError(f'{count} levels of the periods {tuple(periods)}')
  if blocks == 'none':
    raise ValueError(
      "model.cms.blocks is 'none': name the blocks whose levels shall learn"
    )
  config = ml_collections.ConfigDict(config.to_dict())
  config.model.cms.periods = tuple(
    period if i < count else 0 for i, period in enumerate(periods)
  )
  config.model.cms.blocks = blocks if count else 'none'
  config.name = f'levels-{count}'
  return config.lock()


def train(config, workdir: pathlib.Path) -> tuple[trained.Trained, dict]:
  """Trains a cell's model, or goes on with it; gives it and its figures."""
  final = run.train(run.prepare(config, workdir))
  made = trained.load(workdir)
  return made, {'trained': made.step, 'valid': final['bits_per_byte']}


def _of_training(counts) -> tuple[dict, dict]:
  config, out = _CONFIG.value, pathlib.Path(_WORKDIR.value)
  loads = {
    count: functools.partial(
      train, with_levels(config, count), out / f'levels-{count}'
    )
    for count in counts
  }
  return loads, {'config': common.plain(config)}


def _of_stacking(counts) -> tuple[dict, dict]:
  if not _TUNE.value:
    raise ValueError('--tune=TEXT: a text to pick the inner rate on is needed')
  if os.path.realpath(_TUNE.value) == os.path.realpath(_NOVEL.value):
    raise ValueError(
      f'--tune={_TUNE.value} is the --novel: the inner rate would be picked on '
      'what is then measured; give another text'
    )
  rates = [float(rate) for rate in _RATES.value]

  def stacked(count: int, rate: float) -> trained.Trained:
    periods = tuple(_PERIODS.value[:count])
    how = _STACK.value if count else ''
    stack = novel.Stack(how, periods, _BLOCKS.value, rate)
    return novel.load(None, _MODEL.value, stack, _DTYPE.value)

  def load(count: int):
    if not count:
      return stacked(0, 0.0), {}
    stacks = {rate: stacked(count, rate) for rate in rates}
    tune = _TUNE.value, _TUNE_TOKENS.value, '--tune'
    tokens = reading.encode(stacks[rates[0]], *tune)
    return reading.pick(stacks, tokens, _WINDOW.value)

  names = (_MODEL, _STACK, _BLOCKS, _PERIODS, _RATES, _TUNE, _TUNE_TOKENS)
  key = {flag.name: flag.value for flag in (*names, _DTYPE)}
  return {count: functools.partial(load, count) for count in counts}, key


def main(argv: list[str]) -> int:
  """Compares; returns 0, 1 for a run that failed, 2 for a refused one."""
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    counts = [int(word) for word in _LEVELS.value]
    make = _of_stacking if _MODEL.value else _of_training
    loads, key = make(counts)
    where = _TOKENS.value, _WINDOW.value, _WORKDIR.value
    print(reading.compare(loads, key, _NOVEL.value, *where))
  except run.Interrupted as stop:
    print(f'levels: {stop}', file=sys.stderr)
    return stop.exit_code
  except (ValueError, OSError, ImportError) as error:
    print(f'levels: {error}', file=sys.stderr)
    return 2
  except run.FAILURES as error:
    print(f'levels: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  parse = command.parser('levels', __doc__, FLAGS, 'novels')
  app.run(main, flags_parser=parse)
