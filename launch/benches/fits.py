"""Compiles configs for topologies: `nestax-bench fits --json=cells.jsonl`.

A cell is a config at a length on a topology, with a row a chip, parameters
and optimiser over up to `--fsdp` chips. What does not fit is tried again:
first recomputing more (`--remat=none,dots,full` in this order, or the config's
own), then with rows shared by two chips, four and so on (the axis `tensor`).
Each is one process of nestax-compile, one after the other, minutes each (start
it by `nice` where others work; `--effort=O1` is about three times sooner done);
its report is added to the file, and what the file holds is not compiled again.
The table is of what fits.
"""

import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import flags

from nestax.launch import fit
from nestax.launch.benches import timing

FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_list(
  'config', ['hope_1_3b', 'hope_760m', 'hope_340m'],
  'Configs to compile, by name or file.',
  flag_values=FLAGS,
)  # fmt: skip
_LENGTH = flags.DEFINE_list(
  'length', ['4096', '32768'],
  'Tokens of a row, several to compare.',
  flag_values=FLAGS,
)  # fmt: skip
_TOPOLOGY = flags.DEFINE_list(
  'topology', ['v5e:16x16', 'v5p:8x8x16', 'v6e:16x16'],
  'Chips to compile for, several to compare.',
  flag_values=FLAGS,
)  # fmt: skip
_FSDP = flags.DEFINE_integer(
  'fsdp', 16, 'Most chips that share a copy of the state.', lower_bound=1,
  flag_values=FLAGS,
)  # fmt: skip
_TENSOR = flags.DEFINE_list(
  'tensor', ['1', '2', '4'],
  'How many chips share a row, tried in turn until it fits.',
  flag_values=FLAGS,
)  # fmt: skip
_REMAT = flags.DEFINE_list(
  'remat', [],
  "What is recomputed, tried in turn: none,dots,full; the config's if none.",
  flag_values=FLAGS,
)  # fmt: skip
_EFFORT = flags.DEFINE_string(
  'effort', '',
  'How hard the compiler tries, O0 to O3, as of nestax-compile.',
  flag_values=FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_string(
  'json', None,
  'File of reports, a line of JSON each; what it holds is not done again.',
  required=True, flag_values=FLAGS,
)  # fmt: skip

COLUMNS = (
  'config', 'length', 'topology', 'mesh', 'rows', 'tokens', 'memory by',
  'remat', 'params GiB', 'optimizer GiB', 'activations GiB', 'total GiB',
  'HBM GiB', 'TFLOP', 'useful', 'compute ms', 'HBM ms', 'ICI ms', 'bound',
  'tokens/s', 'MFU',
)  # fmt: skip


class Trial(NamedTuple):
  """How a cell is laid out: chips that share a row, what is recomputed."""

  tensor: int = 1
  remat: str = ''  # as `model.remat`; '' for the config's own


class Cell(NamedTuple):
  """A config at a length on a topology."""

  config: str
  length: int
  topology: str


def chips_of(topology: str) -> int:
  """Devices of a topology such as v5e:16x16 or cpu:8."""
  return math.prod(map(int, topology.partition(':')[2].split('x')))


def words(cell: Cell, trial: Trial, fsdp: int, effort: str = '') -> list[str]:
  """The command line of nestax-compile, without its file.

  Raises:
    ValueError: if the chips cannot be shared out so.
  """
  chips, tensor = chips_of(cell.topology), trial.tensor
  if chips % tensor:
    raise ValueError(f'--tensor={tensor}: {cell.topology} has {chips} chips')
  rows = chips // tensor
  shared = math.gcd(rows, fsdp)
  return [
    f'--config={cell.config}',
    f'--topology={cell.topology}',
    f'--config.data.length={cell.length}',
    f'--config.train.batch={rows}',
    f'--config.mesh.data={rows // shared}',
    f'--config.mesh.fsdp={shared}',
    f'--config.mesh.tensor={tensor}',
    *([f'--config.model.remat={trial.remat}'] if trial.remat else []),
    *([f'--effort={effort}'] if effort else []),
  ]


def fill(
  cells: Sequence[Cell],
  trials: Sequence[Trial],
  fsdp: int,
  path: pathlib.Path,
  run: Callable[[list[str], pathlib.Path], None],
  effort: str = '',
) -> list[dict]:
  """Compiles what the file lacks.

  Args:
    cells: in the order in which they are compiled.
    trials: in turn until it fits.
    fsdp: see `words`.
    path: of the reports.
    run: compiles for a command line and adds the report to the file.
    effort: of the compiler.

  Returns:
    The last report of each cell: the one that fits, if one does.
  """
  rows = []
  for cell in cells:
    for trial in trials:
      asked = words(cell, trial, fsdp, effort)
      row = _known(path, asked)
      if row is None:
        run(asked, path)
        row = _known(path, asked)
      print(f'{" ".join(asked)}\n{fit.verdict(row)}', flush=True)
      if row['fits']:
        break
    rows.append(row)
  return rows


def _known(path: pathlib.Path, asked: list[str]) -> dict | None:
  for line in path.read_text().splitlines() if path.exists() else ():
    row = json.loads(line)
    if row['asked'] == asked:
      return row
  return None


def compile_cell(asked: list[str], path: pathlib.Path) -> None:
  """One process of nestax-compile; adds its report, with what was asked.

  Raises:
    ValueError: with the command's own words, if it refuses.
  """
  fresh = path.with_suffix('.new')
  fresh.unlink(missing_ok=True)
  command = [sys.executable, '-m', 'nestax.launch.compile', *asked]
  done = subprocess.run(
    [*command, f'--json={fresh}'],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  if done.returncode not in (0, 1) or not fresh.exists():
    last = done.stderr.strip().splitlines() or ['no word']
    raise ValueError(f'{" ".join(asked)}: {last[-1]}')
  fit.append({'asked': asked} | json.loads(fresh.read_text()), path)
  fresh.unlink()


def table(rows: Sequence[dict]) -> list[dict]:
  """The columns of the reports that fit."""
  return [{name: row[name] for name in COLUMNS} for row in rows if row['fits']]


def main() -> None:
  """Fills the file and prints the table."""
  cells = [
    Cell(config, int(length), topology)
    for length in _LENGTH.value
    for config in _CONFIG.value
    for topology in _TOPOLOGY.value
  ]
  trials = [
    Trial(int(tensor), remat)
    for tensor in _TENSOR.value
    for remat in _REMAT.value or ['']
  ]
  path = pathlib.Path(_JSON.value)
  made = fill(cells, trials, _FSDP.value, path, compile_cell, _EFFORT.value)
  rows = table(made)
  if rows:
    timing.show(rows, 'what fits, of a device; least time of a step')
