"""Reads a long text as a stream: `nestax-evaluate --text=novel.txt`.

With `--levels=on,off,reset:8192` the same text is read once each way and the
perplexities stand in one table; `--stack=groups` lets the MLPs of a pretrained
Transformer (`--model=FILE`) learn as they read.
"""

import sys

from absl import flags

from nestax.launch import checkpoint, command
from nestax.launch.evals import novel

# Its own, so that the module can be imported beside the commands.
FLAGS = flags.FlagValues()


def _flag(define, name, default, words, **options):
  return define(name, default, words, flag_values=FLAGS, **options)


_WORKDIR = _flag(
  flags.DEFINE_string, 'workdir', None, 'Run folder of the model.'
)
_MODEL = _flag(flags.DEFINE_string, 'model', None, 'Pretrained file instead.')
_OWNER = _flag(flags.DEFINE_string, 'owner', '', 'Whose slots, of a life.')
_TEXT = _flag(flags.DEFINE_string, 'text', None, 'UTF-8 file to read.')
_OUT = _flag(
  flags.DEFINE_string, 'out', 'runs/evaluate', 'Folder for the results.'
)
_LEVELS = _flag(
  flags.DEFINE_list, 'levels', ['on', 'off'], 'on, off, reset:TOKENS.'
)
_STACK = _flag(
  flags.DEFINE_string, 'stack', '', 'groups or copies, with --model.'
)
_PERIODS = _flag(
  flags.DEFINE_list, 'periods', ['128', '512'], 'Of stacked levels.'
)
_BLOCKS = _flag(
  flags.DEFINE_string, 'blocks', 'all', 'Which stacked blocks learn.'
)
_RATE = _flag(flags.DEFINE_float, 'rate', 0.1, 'Inner rate of stacked levels.')
_PIECE = _flag(flags.DEFINE_integer, 'piece', 1024, 'Tokens a call.')
_WINDOW = _flag(flags.DEFINE_integer, 'window', 2048, 'Tokens attention sees.')
_DTYPE = _flag(flags.DEFINE_string, 'dtype', None, 'float32 or bfloat16.')
_TOKENS = _flag(flags.DEFINE_integer, 'tokens', 0, 'Read only so many; 0: all.')

parse = command.parser('nestax-evaluate', __doc__, FLAGS)


def main(argv: list[str]) -> int:
  """Evaluates; returns 0, or 2 if something asked for is not there."""
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    if not _TEXT.value:
      raise ValueError('give --text=FILE, or --suite=NAME')
    modes = novel.modes(_LEVELS.value, _PIECE.value, _WINDOW.value)
    stack = novel.Stack(
      _STACK.value, tuple(_PERIODS.value), _BLOCKS.value, _RATE.value
    )
    made = novel.load(
      _WORKDIR.value, _MODEL.value, stack, _DTYPE.value, _OWNER.value
    )
    novel.run(made, _TEXT.value, modes, _OUT.value, _TOKENS.value)
  except (ValueError, OSError, ImportError, checkpoint.CheckpointError) as e:
    print(f'nestax-evaluate: {e}', file=sys.stderr)
    return 2
  return 0
