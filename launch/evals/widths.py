"""Do rates transfer over widths? `python -m nestax.launch.evals.widths`.

M3 trains a Transformer of one block on the quickstart's data, in short rows,
at several widths and learning rates, with updates scaled to a consistent RMS
and with none of it. Only the matrices take the rate; the rest of the
parameters keep AdamW's of --rest, so that a width's best rate is that of the
orthogonalised updates alone. What is done is kept in `W/cells`; the same
command goes on where it stopped.
"""

import functools
import itertools
import math
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, flags

from nestax.launch import command, groups, optimizer, room
from nestax.launch.benches import timing
from nestax.launch.configs import quickstart
from nestax.launch.evals import (
  cells,
  comparison,
  fitting,
  pretraining,
  sweep,
)

FORMS = {'consistent RMS 0.2': 0.2, 'no scaling': 0.0}
FIGURE = 'valid bits/byte'
FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/widths',
  'Folder of the results; what it holds is not done again.',
  flag_values=FLAGS,
)  # fmt: skip
_WIDTHS = flags.DEFINE_list(
  'widths', ['32', '64', '128'],
  'Widths of the model to compare.',
  flag_values=FLAGS,
)  # fmt: skip
_LOWEST = flags.DEFINE_float(
  'lowest', 0.012,
  'Lowest learning rate of the matrices.',
  lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_RATES = flags.DEFINE_integer(
  'rates', 6,
  'How many learning rates to try, each twice the one before.',
  lower_bound=3, flag_values=FLAGS,
)  # fmt: skip
_REST = flags.DEFINE_float(
  'rest', 0.006,
  'Learning rate of AdamW, for all that is no matrix.',
  lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_SEEDS = flags.DEFINE_integer(
  'seeds', 2,
  'Runs at each learning rate, each with its seed.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_STEPS = flags.DEFINE_integer(
  'steps', 150, 'Training steps of each run.', lower_bound=10, flag_values=FLAGS
)


def make_config(
  width: int, rms: float, steps: int
) -> ml_collections.ConfigDict:
  """Gives a Transformer of one block of a width, 4 x 64 bytes a step."""
  config = quickstart.get_config()
  config.model.update(
    {'family': 'transformer', 'D': width, 'F': 3 * width, 'N': 1}
  )
  config.data.update({'length': 64, 'valid_batches': 32})
  config.train.update({'steps': steps, 'batch': 4})
  config.opt.update({'lr': 1.0, 'warmup': steps // 10, 'consistent_rms': rms})
  config.optimizer = 'm3'
  return config


def make(config: ml_collections.ConfigDict, params, rest: float) -> sweep.Make:
  """Gives the config's optimiser as a function of the matrices' rate alone.

  Args:
    config: with `opt.lr` 1.
    params: parameters or their shapes.
    rest: peak rate of everything that is no matrix.
  """
  tx, _ = optimizer.build(config, params)
  chosen = groups.choose(config, params)

  def of(rate):
    scales = {
      groups.MATRIX: optax.scale(rate),
      groups.REST: optax.scale(rest),
      groups.FROZEN: optax.identity(),
    }
    return optax.chain(tx, optax.partition(scales, chosen))

  return of


def measure(
  config: ml_collections.ConfigDict,
  rates: Sequence[float],
  rest: float,
  seeds: int,
) -> list[dict]:
  """Trains one width in one form at all rates and seeds, side by side."""
  task = pretraining.task(config, seeds)
  shapes = jax.eval_shape(task.init, task.data, jnp.int32(0))
  steps = config.train.steps
  every = math.gcd(steps, max(1, steps // 4))
  tx = make(config, shapes, rest)
  return fitting.run(task, tx, rates, seeds, steps, every)


def optimum(rates: Sequence[float], means: Sequence[float]) -> float:
  """Places the best rate between those of a grid, by a parabola in its log.

  Through the least mean and its neighbours; at an end of the grid, or beside
  a rate that diverged, it is the grid's own.
  """
  finite = np.where(np.isfinite(means), means, np.inf)
  best = int(np.argmin(finite))
  if best in (0, len(rates) - 1):
    return rates[best]
  left, mid, right = finite[best - 1 : best + 2]
  bend = left - 2 * mid + right
  if not 0 < bend < math.inf:
    return rates[best]
  step = math.log(rates[best + 1] / rates[best])
  return rates[best] * math.exp(step * 0.5 * (left - right) / bend)


def table(results: dict[tuple[str, int], list[dict]]) -> str:
  """Writes the means at every rate, and what a transferred rate costs.

  Args:
    results: rows of `sweep.run` by form and width.

  Returns:
    Markdown. 'at the narrowest's' is the figure at the grid's best rate of
    the narrowest width in the same form, less the width's own best.
  """
  lines, first = [], {}
  rates = sorted({row['rate'] for rows in results.values() for row in rows})
  for (form, width), rows in sorted(results.items()):
    means = [comparison.final(rows, r, FIGURE).mean() for r in rates]
    best, edge = comparison.pick(rows, FIGURE)
    first.setdefault(form, best)
    at_best = comparison.final(rows, best, FIGURE)
    spread = at_best.std(ddof=1) if len(at_best) > 1 else 0.0
    lost = means[rates.index(first[form])] - at_best.mean()
    lines.append(
      [form, str(width)]
      + [f'{mean:.3f}' for mean in means]
      + [f'{best:g}' + (' (edge)' if edge else ''), f'{spread:.3f}']
      + [f'{optimum(rates, means):.3g}', f'{lost:.3f}']
    )
  head = ['form', 'width', *(f'{rate:g}' for rate in rates)]
  head += ['best', '±', 'parabola', "at the narrowest's"]
  return timing.markdown(head, lines)


def _cell(folder, form, width, rates):
  steps, seeds, rest = _STEPS.value, _SEEDS.value, _REST.value
  key = {'form': form, 'width': width, 'rates': list(rates), 'steps': steps}
  key |= {'seeds': seeds, 'rest': rest}
  path = folder / 'cells' / f'{width}-{FORMS[form]:g}.json'
  rows = cells.read(path, key)
  if rows is None:
    rows = measure(make_config(width, FORMS[form], steps), rates, rest, seeds)
    cells.write(path, key, rows)
    print(f'{form}, {width}: done', flush=True)
  return rows


def main(argv: list[str]) -> int:
  """Measures; returns 0, or 2 for what cannot be done."""
  folder = pathlib.Path(_WORKDIR.value)
  rates = [_LOWEST.value * 2**i for i in range(_RATES.value)]
  try:
    if argv[1:]:
      raise ValueError(f'{argv[1]!r} is no flag')
    widths = [_width(word) for word in _WIDTHS.value]
    grid = itertools.product(FORMS, widths)
    one = functools.partial(_cell, folder, rates=rates)
    with room.wanted('a run'):
      results = {(form, width): one(form, width) for form, width in grid}
  except (ValueError, OSError, room.OutOfMemory) as error:
    print(f'widths: {error}', file=sys.stderr)
    return 2
  words = f'{FIGURE}, {_SEEDS.value} seeds, {_STEPS.value} steps; others at '
  words += f'{_REST.value:g}; {timing.device()}\n\n{table(results)}'
  (folder / 'table.md').write_text(words + '\n')
  print(words)
  return 0


def _width(word: str) -> int:
  if not word.isdecimal() or int(word) < 2 or int(word) % 2:
    raise ValueError(f'{word!r} is no width: an even number, 2 or above')
  return int(word)


if __name__ == '__main__':
  app.run(main, flags_parser=command.parser('widths', __doc__, FLAGS))
