"""Samples text: `nestax-generate --workdir=runs/quickstart --prompt='def '`."""

import itertools
import sys

from absl import app, flags

from nestax.launch import checkpoint, sampling, trained
from nestax.launch.configs import common

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run; runs/quickstart.')
_MODEL = flags.DEFINE_string('model', None, 'Weights instead of a run.')
_OWNER = flags.DEFINE_string('owner', '', 'Whose slots, of a life.')
_PROMPT = flags.DEFINE_string('prompt', '', 'Text to go on from.')
_FILE = flags.DEFINE_string('prompt_file', None, 'UTF-8 file to go on from.')
_TOKENS = flags.DEFINE_integer('tokens', 400, 'Most to draw.', lower_bound=0)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.8, '0: the likeliest.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Only the k likeliest; 0: all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Only the likeliest that hold p.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the draws.')
_WRONG = ValueError, OSError, ImportError


def main(argv: list[str]) -> int:
  """Samples; returns 0, or 2 if something asked for is not there."""
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    limits = _TOP_K.value, _TOP_P.value
    how = sampling.Sampling(_TEMPERATURE.value, *limits, _SEED.value)
    prompt = sampling.read_prompt(_PROMPT.value, _FILE.value)
    made = trained.choose(_WORKDIR.value, _MODEL.value, _OWNER.value)
    model, params, tokenizer = made[:3]
    drawn = sampling.text(model, params, tokenizer, prompt, _TOKENS.value, how)
  except (*_WRONG, checkpoint.CheckpointError) as error:
    return _refuse(error)
  sys.stdout.reconfigure(errors='replace')  # a terminal may know less UTF-8
  for piece in itertools.chain([prompt], drawn, ['\n']):
    print(piece, end='', flush=True)
  return 0


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    sys.exit(_refuse(error))
  common.quiet()
  return rest


def _refuse(error: Exception) -> int:
  print(f'nestax-generate: {error}', file=sys.stderr)
  return 2


def cli() -> None:
  app.run(main, flags_parser=_parse)


if __name__ == '__main__':
  cli()
