"""What a compiled step needs of a device, beside what a device has."""

import json
import os
import re
from typing import Any

from nestax.launch import ahead, chips, costs, hlo
from nestax.launch.benches import timing
from nestax.launch.chips import GIB
from nestax.models import language_model


def report(
  made: ahead.Compiled, topology: str, peaks: chips.Peaks | None
) -> dict[str, Any]:
  """Measures a compiled step.

  Args:
    made: the step.
    topology: that it was compiled for.
    peaks: of a device; None where they are not known, then what depends on
      them is None.

  Returns:
    Numbers of one device, but for rows, tokens and tokens/s. 'activations'
    are all temporaries, gradients and gathered parameters among them; 'rest'
    is the program itself, the batch, and what tiles pad; 'host GiB' what
    waits in the host's memory (`model.remat='offload'`). 'step ms' is the
    longest of the three times above it, as if they overlapped entirely; 'in a
    row' their sum. Of branches (the renewal of slow momenta) the dearest is
    counted; 'usual TFLOP' is a step without it. 'useful' is the share of the
    FLOPs that `flops_per_token` asks for.
  """
  row = _asked(made, topology) | _memory(made, peaks)
  if made.program is None:
    return row
  module = hlo.parse(made.program.as_text())
  cost = costs.costs(module)
  row |= {
    'TFLOP': cost.flops / 1e12,
    'usual TFLOP': costs.costs(module, cheapest=True).flops / 1e12,
    'useful': _wanted(made) / cost.flops,
    'HBM GB': cost.traffic / 1e9,
  }
  row |= {f'{kind} GB': cost.sent[kind] / 1e9 for kind in costs.KINDS}
  row['loops not read'] = len(cost.unknown)
  return row | _times(made, cost, peaks)


def _asked(made: ahead.Compiled, topology: str) -> dict[str, Any]:
  config, mesh = made.plan.config, made.plan.mesh
  decoding = isinstance(made.state, ahead.Serving)
  laid = [f'{name}={n}' for name, n in mesh.shape.items() if n > 1]
  rows = config.train.batch
  return {
    'config': config.name,
    'step': 'decode' if decoding else 'train',
    'topology': topology,
    'devices': mesh.size,
    'mesh': ' '.join(laid) or 'one device',
    'memory by': made.memory,
    'remat': config.model.remat,
    'rows': rows,
    'length': config.data.length,
    'microbatches': 1 if decoding else config.train.accumulate,
    'tokens': rows if decoding else rows * config.data.length,
    'compile s': made.seconds,
  }


def _memory(made: ahead.Compiled, peaks) -> dict[str, Any]:
  state = made.state
  row = {
    'params GiB': ahead.bytes_of(state.params) / GIB,
    'optimizer GiB': ahead.bytes_of(state.opt_state) / GIB,
    'memories GiB': ahead.bytes_of(state.memory) / GIB,
  }
  known, there = sum(row.values()), peaks and peaks.memory / GIB
  if made.program is None:
    used = re.search(r'Used ([\d.]+)([MGT])', made.refused)
    scale = {'M': 2**-10, 'G': 1, 'T': 2**10}
    total = float(used[1]) * scale[used[2]] if used else None
    row |= {'activations GiB': None, 'rest GiB': None, 'total GiB': total}
    return row | {'HBM GiB': there, 'fits': False, 'refused': made.refused}
  need = made.program.memory_analysis()
  total = timing.compiled_peak(made.program) / GIB
  total += need.generated_code_size_in_bytes / GIB
  activations = need.temp_size_in_bytes / GIB
  return row | {
    'activations GiB': activations,
    'rest GiB': total - activations - known,
    'total GiB': total,
    'host GiB': need.host_temp_size_in_bytes / GIB,
    'HBM GiB': there,
    'fits': None if there is None else total <= there,
  }


def _wanted(made: ahead.Compiled) -> float:
  """FLOPs of a device that the model asks for, nothing recomputed."""
  config = made.plan.config
  length = config.data.length
  flops = language_model.flops_per_token(made.plan.model.cfg, length)
  if isinstance(made.state, ahead.Serving):
    return flops * config.train.batch / made.plan.mesh.size
  return 3 * flops * config.train.batch * length / made.plan.mesh.size


def _times(made: ahead.Compiled, cost: costs.Costs, peaks) -> dict[str, Any]:
  if peaks is None:
    return {}
  busy = chips.times(peaks, cost)
  step = max(busy)
  tokens = _asked(made, '')['tokens']
  return {
    'compute ms': busy.compute * 1e3,
    'HBM ms': busy.memory * 1e3,
    'ICI ms': busy.links * 1e3,
    'bound': busy.bound,
    'step ms': step * 1e3,
    'in a row ms': sum(busy) * 1e3,
    'tokens/s': tokens / step,
    'MFU': _wanted(made) / step / peaks.flops,
  }


def show(row: dict[str, Any]) -> None:
  """Prints a report, a number a line, and whether the step fits."""
  lines = [{'name': name, 'of a device': row[name]} for name in row]
  timing.show(lines, f'{row["config"]} on {row["topology"]}')
  print(f'\n{verdict(row)}')


def verdict(row: dict[str, Any]) -> str:
  """Whether it fits and what bounds it, in a sentence."""
  if row['fits'] is None:
    return 'Whether it fits is not known: give --peaks of a device.'
  total, there = row['total GiB'], row['HBM GiB']
  if not row['fits']:
    needed = f'{total:.2f} GiB' if total else row['refused']
    return f'It does not fit: {needed} of {there:g} GiB.'
  bound = f', at least {row["step ms"]:.4g} ms, bound by {row["bound"]}'
  return f'It fits: {total:.2f} of {there:g} GiB{bound}.'


def append(row: dict[str, Any], path: str | os.PathLike) -> None:
  """Adds a report to a file of JSON lines; to none, if there is no path."""
  if not path:
    return
  with open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps(row) + '\n')
