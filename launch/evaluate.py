"""Reads a long text as a stream: `nestax-evaluate --text=novel.txt`.

With `--levels=on,off,reset:8192` the same text is read once each way and the
perplexities stand in one table; `--stack=groups` lets the MLPs of a pretrained
Transformer (`--model=FILE`) learn as they read.
"""

import sys

from absl import app, flags

from nestax.launch import checkpoint
from nestax.launch.configs import common
from nestax.launch.evals import novel

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run folder of the model.')
_MODEL = flags.DEFINE_string('model', None, 'Pretrained file instead.')
_TEXT = flags.DEFINE_string('text', None, 'UTF-8 file to read.', required=True)
_OUT = flags.DEFINE_string('out', 'runs/evaluate', 'Folder for the results.')
_LEVELS = flags.DEFINE_list('levels', ['on', 'off'], 'on, off, reset:TOKENS.')
_STACK = flags.DEFINE_string('stack', '', 'groups or copies, with --model.')
_PERIODS = flags.DEFINE_list('periods', ['128', '512'], 'Of stacked levels.')
_BLOCKS = flags.DEFINE_string('blocks', 'all', 'Which stacked blocks learn.')
_RATE = flags.DEFINE_float('rate', 0.1, 'Inner rate of stacked levels.')
_PIECE = flags.DEFINE_integer('piece', 1024, 'Tokens a call.')
_WINDOW = flags.DEFINE_integer('window', 2048, 'Tokens attention sees.')
_DTYPE = flags.DEFINE_string('dtype', None, 'float32 or bfloat16.')
_TOKENS = flags.DEFINE_integer('tokens', 0, 'Read only so many; 0: all.')


def main(argv: list[str]) -> int:
  """Evaluates; returns 0, or 2 if something asked for is not there."""
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    modes = novel.modes(_LEVELS.value, _PIECE.value, _WINDOW.value)
    stack = novel.Stack(
      _STACK.value, tuple(_PERIODS.value), _BLOCKS.value, _RATE.value
    )
    made = novel.load(_WORKDIR.value, _MODEL.value, stack, _DTYPE.value)
    novel.run(made, _TEXT.value, modes, _OUT.value, _TOKENS.value)
  except (ValueError, OSError, ImportError, checkpoint.CheckpointError) as e:
    print(f'nestax-evaluate: {e}', file=sys.stderr)
    return 2
  return 0


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    print(f'nestax-evaluate: {error}', file=sys.stderr)
    sys.exit(2)
  common.quiet()
  return rest


def cli() -> None:
  app.run(main, flags_parser=_parse)


if __name__ == '__main__':
  cli()
