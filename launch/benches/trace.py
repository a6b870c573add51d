"""Where the time of a step goes, by operation: what `--top` shows."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable

import jax

# Their time is that of what they contain.
_CONTAINERS = ('while', 'call', 'conditional')
_SCOPE = re.compile(r'%?([\w.\-]+) = .*metadata=\{.*?op_name="([^"]*)"')


def top(run: Callable[[], object], hlo: str, count: int) -> list[dict]:
  """Traces one call, and adds up the time of each operation.

  Args:
    run: makes the step; called once before the trace, for what is made once.
    hlo: the optimised program's text, which says where an operation is from.
    count: rows at most.

  Returns:
    Rows from the dearest on: milliseconds (of all devices and threads
    together), its share of what all operations took, the operation, times it
    ran, and the scope in the model that it comes from. The last row is the
    rest. No rows where the profiler names no operations.
  """
  jax.block_until_ready(run())
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(run())
    spent, times = _spent(pathlib.Path(folder))
  scopes = dict(_SCOPE.findall(hlo))
  whole = sum(spent.values())
  rows = [
    _row(name, seconds, whole, times[name], scopes.get(name, ''))
    for name, seconds in spent.most_common(count)
  ]
  rest = set(spent) - {row['operation'] for row in rows}
  if rest:
    seconds = sum(spent[name] for name in rest)
    ran = sum(times[name] for name in rest)
    rows.append(_row(f'{len(rest)} others', seconds, whole, ran, ''))
  return rows


def _row(name: str, seconds: float, whole: float, times: int, scope: str):
  # jit(step)/ and transformations say nothing of where in the model it is
  return {
    'operation': name,
    'ms': seconds * 1e3,
    'share': seconds / whole,
    'times': times,
    'from': scope.partition('/')[2][-70:],
  }


def _spent(folder: pathlib.Path):
  """Seconds and runs of every operation in the trace below `folder`."""
  spent, times = collections.Counter(), collections.Counter()
  for path in folder.rglob('*.xplane.pb'):
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      device = plane.name.startswith('/device:')
      for line in plane.lines:
        for event in line.events:
          name = dict(event.stats).get('hlo_op') or (device and event.name)
          if name and not name.startswith(_CONTAINERS):
            spent[name] += event.duration_ns / 1e9
            times[name] += 1
  return spent, times
