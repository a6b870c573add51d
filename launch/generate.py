"""Samples text: `nestax-generate --workdir=runs/quickstart --prompt='def '`."""

import itertools
import sys

import jax
from absl import app, flags

from nestax.launch import checkpoint, command, room, sampling, trained

# Its own, so that the module can be imported beside the other commands.
FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
  'workdir', None,
  'Folder of the run to sample from; runs/quickstart if not given.',
  flag_values=FLAGS,
)  # fmt: skip
_MODEL = flags.DEFINE_string(
  'model', None,
  'File of a pretrained model to use instead of a run.',
  flag_values=FLAGS,
)  # fmt: skip
_OWNER = flags.DEFINE_string(
  'owner', '',
  'Owner whose slots to use, of a run of nestax-sleep --scope=owner.',
  flag_values=FLAGS,
)  # fmt: skip
_PROMPT = flags.DEFINE_string(
  'prompt', '', 'Text that the model goes on from.', flag_values=FLAGS
)
_FILE = flags.DEFINE_string(
  'prompt_file', None,
  'UTF-8 file that holds the text to go on from.',
  flag_values=FLAGS,
)  # fmt: skip
_TOKENS = flags.DEFINE_integer(
  'tokens', 400,
  'Most tokens to draw after the prompt.',
  lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.8,
  'How freely to draw: 1 as the model has learned, 0 the likeliest token.',
  flag_values=FLAGS,
)  # fmt: skip
_TOP_K = flags.DEFINE_integer(
  'top_k', 0,
  'Draw among the k likeliest tokens only; 0: among all.',
  flag_values=FLAGS,
)  # fmt: skip
_TOP_P = flags.DEFINE_float(
  'top_p', 1.0,
  'Draw only among the likeliest tokens that together have this chance.',
  flag_values=FLAGS,
)  # fmt: skip
_SEED = flags.DEFINE_integer(
  'seed', 0,
  'Seed of the draws: the same one draws the same text.',
  flag_values=FLAGS,
)  # fmt: skip
_WRONG = ValueError, OSError, ImportError
_LESS = (
  'a smaller model or, of one with attention, a shorter prompt and fewer '
  '--tokens'
)


def main(argv: list[str]) -> int:
  """Samples; returns 0, or 2 if something asked for is not there."""
  try:
    with room.wanted('the model and its state', _LESS):
      return _sample(argv)
  except room.OutOfMemory as error:
    return _refuse(error)


def _sample(argv: list[str]) -> int:
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    limits = _TOP_K.value, _TOP_P.value
    how = sampling.Sampling(_TEMPERATURE.value, *limits, _SEED.value)
    prompt = sampling.read_prompt(_PROMPT.value, _FILE.value, '--prompt_file')
    made = trained.choose(_WORKDIR.value, _MODEL.value, _OWNER.value)
    model, params, tokenizer = made[:3]
    drawn = sampling.text(model, params, tokenizer, prompt, _TOKENS.value, how)
  except (*_WRONG, checkpoint.CheckpointError) as error:
    return _refuse(error)
  size = sum(x.size for x in jax.tree.leaves(params))
  print(
    f'nestax-generate: {size:,} parameters on 1 '
    f'{jax.devices()[0].device_kind}, compiling',
    file=sys.stderr,  # stdout is the text alone
    flush=True,
  )
  sys.stdout.reconfigure(errors='replace')  # a terminal may know less UTF-8
  for piece in itertools.chain([prompt], drawn, ['\n']):
    print(piece, end='', flush=True)
  return 0


def _refuse(error: Exception) -> int:
  print(f'nestax-generate: {error}', file=sys.stderr)
  return 2


def cli() -> None:
  app.run(main, flags_parser=command.parser('nestax-generate', __doc__, FLAGS))


if __name__ == '__main__':
  cli()
