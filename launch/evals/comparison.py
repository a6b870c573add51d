"""Picks learning rates, and writes a comparison's table, plot and rows."""

import json
import math
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib import figure

from nestax.launch.benches import timing
from nestax.launch.evals import cells

# What the learning rate of a suite is picked by: the mean over seeds at the
# last step. Where nothing else is drawn, as in 'orthogonal', it is reported.
SELECT = {
  'vit': 'valid loss',
  'lm': 'valid bits/byte',
  'orthogonal': 'loss, tasks seen',
}
_COORDINATES = ('suite', 'optimizer', 'rate', 'seed', 'step')
RULE = (
  'Learning rate: of the same grid for all, the one with the lowest mean over '
  'seeds of the suite\'s validation figure at the last step ("edge" if at an '
  'end of the grid). Mean ± standard deviation over seeds at that rate; nan '
  'for a rate that diverged. ms: one run alone.'
)


def final(rows: Iterable[dict], rate: float, name: str) -> np.ndarray:
  """Gives a figure of every seed at a rate's last step, nan for not finite."""
  rows = [row for row in rows if row['rate'] == rate]
  last = max(row['step'] for row in rows)
  values = [row[name] for row in rows if row['step'] == last]
  return np.array([math.nan if v is None else v for v in values])


def pick(rows: Sequence[dict], name: str) -> tuple[float, bool]:
  """Picks the rate with the lowest mean over seeds, none of which diverged.

  Returns:
    The rate, and whether it is at an end of the grid.
  """
  rates = sorted({row['rate'] for row in rows})
  means = [final(rows, rate, name).mean() for rate in rates]
  best = int(np.argmin(np.where(np.isfinite(means), means, np.inf)))
  return rates[best], best in (0, len(rates) - 1)


def stays_below(rows: Sequence[dict], name: str, bound: float) -> int | None:
  """Finds the step from which on the mean over seeds is at most `bound`."""
  steps, means, _, _ = curve(rows, name)
  above = np.flatnonzero(~(means <= bound))
  first = above[-1] + 1 if len(above) else 0
  return int(steps[first]) if first < len(steps) else None


def curve(rows: Sequence[dict], name: str):
  """Gives steps, and the mean, least and largest figure of the seeds there."""
  steps = sorted({row['step'] for row in rows})
  values = np.array(
    [
      [
        math.nan if row[name] is None else row[name]
        for row in rows
        if row['step'] == step
      ]
      for step in steps
    ]
  )
  return np.array(steps), values.mean(1), values.min(1), values.max(1)


def write(folder: pathlib.Path) -> str:
  """Writes `table.md`, `curves.png` and `rows.jsonl` of the cells there are.

  Returns:
    The tables.

  Raises:
    FileNotFoundError: if nothing was trained yet.
    cells.CellError: if a suite's cells are not of the same settings.
  """
  results, milliseconds = _read(folder)
  if not results:
    raise FileNotFoundError(f'no results in {folder}: train first')
  best = {}
  for (suite, name), rows in results.items():
    rate, edge = pick(rows, SELECT[suite])
    best[suite, name] = rate, edge, [r for r in rows if r['rate'] == rate]
  words = (
    RULE
    + f' On {timing.device()}.\n\n'
    + '\n\n'.join(
      _table(suite, results, best, milliseconds)
      for suite in SELECT
      if any(suite == s for s, _ in best)
    )
  )
  (folder / 'table.md').write_text(words + '\n')
  with (folder / 'rows.jsonl').open('w') as file:
    for rows in results.values():
      file.writelines(json.dumps(row) + '\n' for row in rows)
  _draw(best, milliseconds, folder / 'curves.png')
  return words


def _read(folder):
  results, milliseconds, trained, timed = {}, {}, {}, {}
  for path in sorted((folder / 'cells').glob('*.json')):
    key, rows = cells.load(path)
    suite, name = rows[0]['suite'], rows[0]['optimizer']
    if 'ms_per_step' in rows[0]:
      milliseconds[suite, name] = rows[0]['ms_per_step']
      timed.setdefault(suite, {})[path] = key
    else:
      results[suite, name] = rows
      trained.setdefault(suite, {})[path] = key
  for suite, found in trained.items():
    cells.same(found, ('steps', 'seeds', 'rates', 'data'))
    cells.same(found | timed.get(suite, {}), ('data',))
  return results, milliseconds


def _table(suite, results, best, milliseconds):
  select = SELECT[suite]
  keys = [key for key in results if key[0] == suite]
  names = [n for n in results[keys[0]][0] if n not in _COORDINATES]
  names.sort(key=lambda n: n != select)
  grid = sorted({row['rate'] for row in results[keys[0]]})
  adamw = best.get((suite, 'adamw'))
  bound = None
  if adamw:
    bound = final(adamw[2], adamw[0], select).mean()
  lines = []
  for key in sorted(keys, key=lambda k: _mean(best[k], select)):
    rate, edge, rows = best[key]
    ms = milliseconds.get(key)
    reached = None if bound is None else stays_below(rows, select, bound)
    lines.append(
      [
        key[1],
        f'{rate:g}' + (' (edge)' if edge else ''),
        *(_spread(final(rows, rate, name)) for name in names),
        '-' if reached is None else str(reached),
        '-' if ms is None else f'{ms:.3g}',
        '-' if None in (ms, reached) else f'{ms * reached / 1e3:.3g}',
      ]
    )
  last = max(row['step'] for row in results[keys[0]])
  seeds = len({row['seed'] for row in results[keys[0]]})
  head = ['optimizer', 'rate', *names, "steps to adamw's end", 'ms', 's to it']
  sweep = ' '.join(f'{rate:g}' for rate in grid)
  title = f'{suite}: {last} steps, {seeds} seeds, rates {sweep}'
  whole = [
    [key[1], *(f'{final(results[key], r, select).mean():.4g}' for r in grid)]
    for key in keys
  ]
  rates = ['optimizer', *(f'{rate:g}' for rate in grid)]
  return (
    f'{title}\n\n{timing.markdown(head, lines)}\n\n'
    f'{suite}: {select} at every rate\n\n{timing.markdown(rates, whole)}'
  )


def _mean(chosen, name):
  mean = final(chosen[2], chosen[0], name).mean()
  return mean if math.isfinite(mean) else math.inf


def _spread(values):
  mean = f'{values.mean():.4f}'
  return mean + f' ± {values.std(ddof=1):.4f}' if len(values) > 1 else mean


def _draw(best, milliseconds, path):
  suites = [s for s in SELECT if any(s == suite for suite, _ in best)]
  size = 11, 3.6 * len(suites)
  # Without pyplot: no window, no global state, no backend to choose.
  picture = figure.Figure(figsize=size, dpi=100, layout='constrained')
  grid = picture.subplots(len(suites), 2, squeeze=False)
  names = sorted({name for _, name in best})
  for suite, (by_step, by_time) in zip(suites, grid):
    for key in [key for key in best if key[0] == suite]:
      steps, mean, low, high = curve(best[key][2], SELECT[suite])
      color = f'C{names.index(key[1])}'
      for axes, x in (
        (by_step, steps),
        (by_time, steps * milliseconds.get(key, math.nan) / 1e3),
      ):
        label = f'{key[1]}, {best[key][0]:g}'
        axes.plot(x, mean, label=label, color=color, linewidth=1.2)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    for axes, words in ((by_step, 'step'), (by_time, 'seconds, one run alone')):
      axes.set(xlabel=words, ylabel=SELECT[suite], title=suite)
      # a panel without a point has no logarithms to lay out: nothing was timed
      if any(np.isfinite(line.get_xdata()).any() for line in axes.lines):
        axes.set_yscale('log')
      else:
        axes.text(0.5, 0.5, 'not timed', ha='center', transform=axes.transAxes)
      axes.grid(alpha=0.3, which='both')
    by_time.legend(loc='center left', bbox_to_anchor=(1, 0.5))
  picture.savefig(path)
