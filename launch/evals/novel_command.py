"""Reads a long text as a stream: `nestax-evaluate --text=novel.txt`.

With `--levels=on,off,reset:8192` the same text is read once each way and the
perplexities stand in one table; `--stack=groups` lets the MLPs of a pretrained
Transformer (`--model=FILE`) learn as they read.
"""

import sys

from absl import flags

from nestax.launch import checkpoint, command, room
from nestax.launch.evals import novel

_LESS = 'shorter pieces (--piece), a shorter --window or --dtype=bfloat16'
# Its own, so that the module can be imported beside the commands.
FLAGS = flags.FlagValues()


def _flag(define, name, default, words, **options):
  return define(name, default, words, flag_values=FLAGS, **options)


_WORKDIR = _flag(
  flags.DEFINE_string, 'workdir', None,
  'Folder of the run whose model reads; or give --model.',
)  # fmt: skip
_MODEL = _flag(
  flags.DEFINE_string, 'model', None,
  'File of a pretrained model to use instead of a run.',
)  # fmt: skip
_OWNER = _flag(
  flags.DEFINE_string, 'owner', '',
  'Owner whose slots to use, of a run of nestax-sleep --scope=owner.',
)  # fmt: skip
_TEXT = _flag(
  flags.DEFINE_string, 'text', None, 'UTF-8 file to read from end to end.'
)
_OUT = _flag(
  flags.DEFINE_string, 'out', 'runs/evaluate',
  "Folder for the table's figures, the plot and those of every call.",
)  # fmt: skip
_LEVELS = _flag(
  flags.DEFINE_list, 'levels', ['on', 'off'],
  'Ways to read: on (levels learn), off (frozen), reset:TOKENS (anew).',
)  # fmt: skip
_STACK = _flag(
  flags.DEFINE_string, 'stack', '',
  'How the MLPs of a --model become levels: groups or copies; none if empty.',
)  # fmt: skip
_PERIODS = _flag(
  flags.DEFINE_list, 'periods', ['128', '512'],
  'Tokens between commits of each stacked level, fastest first.',
)  # fmt: skip
_BLOCKS = _flag(
  flags.DEFINE_string, 'blocks', 'all',
  'Blocks whose levels learn: all, last_quarter, or numbers such as 3,5.',
)  # fmt: skip
_RATE = _flag(
  flags.DEFINE_float, 'rate', 0.1, 'Inner learning rate of the stacked levels.'
)
_PIECE = _flag(
  flags.DEFINE_integer, 'piece', 1024,
  'Tokens that one call of the model reads.',
)  # fmt: skip
_WINDOW = _flag(
  flags.DEFINE_integer, 'window', 2048,
  'Tokens that attention sees, the last ones.',
)  # fmt: skip
_DTYPE = _flag(
  flags.DEFINE_string, 'dtype', None,
  "Type to compute in, float32 or bfloat16; the model's own if not given.",
)  # fmt: skip
_TOKENS = _flag(
  flags.DEFINE_integer, 'tokens', 0,
  'Tokens of the text to read, from its start; 0: all.',
)  # fmt: skip

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
    with room.wanted('the model and what it reads', _LESS):
      made = novel.load(
        _WORKDIR.value, _MODEL.value, stack, _DTYPE.value, _OWNER.value
      )
      novel.run(made, _TEXT.value, modes, _OUT.value, _TOKENS.value)
  except (
    ValueError, OSError, ImportError, room.OutOfMemory,
    checkpoint.CheckpointError,
  ) as e:  # fmt: skip
    print(f'nestax-evaluate: {e}', file=sys.stderr)
    return 2
  return 0
