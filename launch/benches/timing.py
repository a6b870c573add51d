"""Times things against each other, and says so in tables and JSON lines."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

_LONG = 5.0  # seconds of a round, from which on what is left is said


def say(words: str) -> None:
  """Tells who waits what goes on; not part of a table that is piped away."""
  print(words, file=sys.stderr, flush=True)


def interleaved(
  runs: Mapping[str, Callable[[], object]],
  repeats: int,
  window: int = 1,
  warmup: int = 1,
) -> dict[str, np.ndarray]:
  """Times every run in turn, so that a machine's moods meet all alike.

  Args:
    runs: each called without arguments does one step and returns arrays,
      which are waited for.
    repeats: rounds over all runs, every other one backwards; what is left is
      said where a round takes seconds.
    window: calls in a row that belong together, if a step's cost has a period.
    warmup: windows of each run before the first round, for compilation.

  Returns:
    Seconds of each call, float64 `[repeats, window]` per name.
  """
  for run in runs.values():
    for _ in range(warmup * window):
      jax.block_until_ready(run())
  seconds = {name: np.zeros((repeats, window)) for name in runs}
  begun = time.perf_counter()
  for repeat in range(repeats):
    took = time.perf_counter() - begun
    if repeat and took > _LONG * repeat:
      left = took / repeat * (repeats - repeat)
      say(f'round {repeat} of {repeats} is done, about {left:.0f} s are left')
    for name in list(runs)[:: -1 if repeat % 2 else 1]:
      for call in range(window):
        start = time.perf_counter()
        jax.block_until_ready(runs[name]())
        seconds[name][repeat, call] = time.perf_counter() - start
  return seconds


def median_ms(seconds: np.ndarray) -> float:
  """Median over the repeats of a window's mean, in milliseconds."""
  return float(np.median(seconds.mean(axis=1)) * 1e3)


def add_ratios(rows: Sequence[dict], names: Sequence[str]) -> None:
  """Adds to rows with 'name' and 'ms' their 'ms' over that of the named."""
  known = {row['name']: row['ms'] for row in rows}
  for row in rows:
    for name in names:
      row[f'/ {name}'] = row['ms'] / known[name]


def device() -> str:
  """Names the device that the numbers are from, and the JAX they ran on."""
  kind = jax.devices()[0].device_kind
  return f'{kind}, {jax.device_count()} device(s), JAX {jax.__version__}'


def peak_bytes() -> int | None:
  """Most bytes the process has held on the first device, if it counts them."""
  stats = jax.devices()[0].memory_stats()
  return stats.get('peak_bytes_in_use') if stats else None


def compiled_peak(compiled) -> int:
  """Bytes that a compiled program needs at most, what it is given included."""
  need = compiled.memory_analysis()
  held = need.argument_size_in_bytes + need.output_size_in_bytes
  return held - need.alias_size_in_bytes + need.temp_size_in_bytes


def show(rows: Sequence[dict], title: str) -> None:
  """Prints rows of equal keys: a table on a terminal, Markdown elsewhere."""
  console = rich_console.Console()
  names = list(rows[0])
  cells = [[_cell(row[name]) for name in names] for row in rows]
  if not console.is_terminal:
    print(f'{title}\n\n{markdown(names, cells)}')
    return
  table = rich_table.Table(title=title)
  for name in names:
    table.add_column(name, justify='left' if name == 'name' else 'right')
  for line in cells:
    table.add_row(*line)
  console.print(table)


def markdown(names: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
  """Lays out a table of Markdown."""
  lines = [names, ['---'] * len(names), *cells]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def append(rows: Sequence[dict], path: str | os.PathLike) -> None:
  """Adds rows to a file of JSON lines, each with the device."""
  with open(path, 'a', encoding='utf-8') as file:
    for row in rows:
      file.write(json.dumps(row | {'device': device()}) + '\n')


def _cell(value) -> str:
  if value is None:
    return '-'
  return f'{value:.4g}' if isinstance(value, float) else str(value)
