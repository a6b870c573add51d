"""Compiles a training step ahead of time and says what it needs.

`nestax-compile --config=hope_1_3b --topology=v5e:16x16 --config.mesh.fsdp=16`:
memory, FLOPs and traffic of a device, the least time a step can take, and
whether it fits. No device is needed: TPUs' programs are compiled by libtpu
(`pip install '.[tpu]'`); cpu:8 is this machine as eight.
`--serve` compiles one token of streams with room for data.length tokens;
`--effort=O1` is about three times sooner done, see `ahead.options`.

In the report 'useful' is the share of TFLOP that the model itself asks for;
the rest is mostly computed again for the gradient, or is the optimizer's.
TFLOP is of a step that renews slow momenta, 'usual TFLOP' of one that does
not. 'loops not read' is how many loops did not show how often they turn: each
counts as one turn, so FLOPs and traffic are too low unless it is 0.
"""

import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from nestax.launch import ahead, chips, command, fit

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  'config', None,
  'Name of a config, see above, or its file; quickstart if not given.',
  flag_values=FLAGS,
)  # fmt: skip
_TOPOLOGY = flags.DEFINE_string(
  'topology', 'v5e:16x16',
  'Chips to compile for: TPUs such as v5p:8x8x16, or cpu:8.',
  flag_values=FLAGS,
)  # fmt: skip
_SERVE = flags.DEFINE_bool(
  'serve', False,
  'Compile decoding of a token for train.batch streams, no training step.',
  flag_values=FLAGS,
)  # fmt: skip
_EFFORT = flags.DEFINE_enum(
  'effort', '', ['', *ahead.EFFORTS],
  'How hard the compiler tries: O0, soonest done, to O3; as in a run if none.',
  flag_values=FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_string(
  'json', '',
  'File that the report is appended to, as a line of JSON.',
  flag_values=FLAGS,
)  # fmt: skip
_HLO = flags.DEFINE_string(
  'hlo', '',
  'File to write the text of the compiled program to.',
  flag_values=FLAGS,
)  # fmt: skip
_PEAKS = flags.DEFINE_list(
  'peaks', [],
  "Peaks to reckon with: FLOP/s, HBM bytes, HBM bytes/s, ICI bytes/s.",
  flag_values=FLAGS,
)  # fmt: skip


def main(argv: list[str]) -> int:
  """Compiles; returns 0, 1 for what does not fit, 2 for what cannot be."""
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    peaks = chips.peaks(_TOPOLOGY.value, _PEAKS.value)
    ahead.settle(_TOPOLOGY.value)
    where = ahead.devices(_TOPOLOGY.value)
    made = ahead.compile_step(
      _CONFIG.value, where, _SERVE.value, print, _EFFORT.value
    )
    if _HLO.value and made.program is not None:
      pathlib.Path(_HLO.value).write_text(made.program.as_text())
  except (ValueError, OSError) as error:
    print(f'nestax-compile: {error}', file=sys.stderr)
    return 2
  row = fit.report(made, _TOPOLOGY.value, peaks)
  fit.show(row)
  fit.append(row, _JSON.value)
  return 1 if row['fits'] is False else 0


def cli() -> None:
  parse = command.parser('nestax-compile', __doc__, FLAGS, 'quickstart')
  app.run(main, flags_parser=parse)


if __name__ == '__main__':
  cli()
