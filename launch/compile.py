"""Compiles a training step ahead of time and says what it needs.

`nestax-compile --config=hope_1_3b --topology=v5e:16x16 --config.mesh.fsdp=16`:
memory, FLOPs and traffic of a device, the least time a step can take, and
whether it fits. No device is needed: TPUs' programs are compiled by libtpu
(`pip install '.[tpu]'`); cpu:8 is this machine as eight.
`--serve` compiles one token of streams with room for data.length tokens;
`--effort=O1` is about three times sooner done, see `ahead.options`.
"""

import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from nestax.launch import ahead, chips, command, fit

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'File, or a bare name.', flag_values=FLAGS
)
_TOPOLOGY = flags.DEFINE_string(
  'topology', 'v5e:16x16', 'Such as v5p:8x8x16, or cpu:8.', flag_values=FLAGS
)
_SERVE = flags.DEFINE_bool(
  'serve', False, 'Decode a token of train.batch streams.', flag_values=FLAGS
)
_EFFORT = flags.DEFINE_enum(
  'effort', '', ['', *ahead.EFFORTS],
  'Of the compiler: O0, soonest done, to O3; as in a run if none.',
  flag_values=FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_string(
  'json', '', 'File that a JSON line is added to.', flag_values=FLAGS
)
_HLO = flags.DEFINE_string(
  'hlo', '', 'File for the text of the compiled program.', flag_values=FLAGS
)
_PEAKS = flags.DEFINE_list(
  'peaks', [], "FLOP/s, HBM, its bytes/s, ICI's bytes/s.", flag_values=FLAGS
)


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
