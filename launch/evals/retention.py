"""What nights have kept: one table, one plot, one line a night."""

import json
import pathlib

import numpy as np
from matplotlib import figure

from nestax.launch.benches import timing
from nestax.launch.evals import cells

HEAD = (
  'method',
  'before the night',
  'after, levels reset',
  'kept',
  'day 1 after its night',
  'day 1 at the end',
  'core loss, first morning',
  'core loss, at the end',
  'rise',
  'rise, other text',
  'dreams that helped',
  's a night',
)
WORDS = (
  'Share of questions answered rightly, in words that the day did not have, '
  'with no text in context; mean over nights, then mean ± standard deviation '
  'over seeds. Before: by what the levels have written. "kept": after / '
  'before. Core loss in nats a token, of the slow weights alone, on text of a '
  'kind that is rehearsed; the other text is of none that is. "no sleep": '
  'before is by levels that are never reset, day 1 at the end too (in '
  'brackets); after is without them.'
)


def write(folder: pathlib.Path) -> str:
  """Writes `table.md`, `rows.jsonl` and `nights.png` of the cells there are.

  Raises:
    FileNotFoundError: if nothing was lived yet.
  """
  found = [cells.read(p) for p in sorted((folder / 'cells').glob('*.json'))]
  if not found:
    raise FileNotFoundError(f'no cells in {folder}: live first')
  groups: dict[tuple, list] = {}
  for rows in found:
    groups.setdefault((rows[-1]['night'], rows[0]['method']), []).append(rows)
  tables = []
  for days in sorted({days for days, _ in groups}, reverse=True):
    chosen = {n: lives for (d, n), lives in groups.items() if d == days}
    seeds = max(map(len, chosen.values()))
    chance = next(iter(chosen.values()))[0][0]['chance']
    know = np.mean([r[0]['after'] for lives in chosen.values() for r in lives])
    lines = [_line(name, lives) for name, lives in chosen.items()]
    tables.append(
      f'{days} nights, up to {seeds} seeds; chance {chance:.3f}, before any '
      f'day {know:.3f}\n\n{timing.markdown(list(HEAD), lines)}'
    )
  text = WORDS + '\n\n' + '\n\n'.join(tables)
  (folder / 'table.md').write_text(text + '\n')
  with (folder / 'rows.jsonl').open('w') as file:
    file.writelines(json.dumps(row) + '\n' for rows in found for row in rows)
  _draw(groups, folder / 'nights.png')
  return text


def numbers(rows: list[dict]) -> dict[str, float]:
  """The figures of one life; NaN where there is none.

  `before`, `after`: means over nights, of the day's own facts. `first`,
  `last`: of day 1's after its night and at the end. `rise`: of the core loss,
  relative. `helped`: share of the dreams that were kept which were paid.
  `seconds`: a night, its reading left out, without the first, which compiles.
  """
  nights = rows[1:]
  before = [row.get('before', np.nan) for row in nights]
  after = [row['after'][-1] for row in nights]
  spent = [
    sum(s for phase, s in row['seconds'].items() if phase != 'read')
    for row in nights[1:] or nights
  ]
  return {
    'before': float(np.mean(before)),
    'after': float(np.mean(after)),
    'kept': float(np.mean(after) / np.mean(before)),
    'first': nights[0]['after'][0],
    'last': nights[-1]['after'][0],
    'held': nights[-1].get('held', [np.nan])[0],
    'core first': rows[0]['core'],
    'core last': nights[-1]['core'],
    'rise': nights[-1]['core'] / rows[0]['core'] - 1,
    'other': nights[-1].get('other', np.nan) / rows[0].get('other', 1.0) - 1,
    'helped': float(np.mean([_helped(row) for row in nights])),
    'seconds': float(np.mean(spent)),
  }


def _helped(row: dict) -> float:
  return row['numbers'].get('dream_paid', np.nan)


def _line(name: str, lives: list) -> list[str]:
  each = [numbers(rows) for rows in lives]

  def spread(key, form='.3f'):
    values = np.array([one[key] for one in each])
    if np.isnan(values).all():
      return '-'
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return f'{values.mean():{form}} ± {deviation:{form}}'

  last = spread('last')
  if spread('held') != '-':
    last += f' ({spread("held")})'
  return [
    name,
    spread('before'),
    spread('after'),
    spread('kept', '.0%'),
    spread('first'),
    last,
    spread('core first'),
    spread('core last'),
    spread('rise', '.2%'),
    spread('other', '.2%'),
    spread('helped', '.0%'),
    spread('seconds', '.1f'),
  ]


def _draw(groups, path):
  most = max(days for days, _ in groups)
  chosen = {n: lives for (d, n), lives in groups.items() if d == most}
  # Without pyplot: no window, no global state, no backend to choose.
  picture = figure.Figure(figsize=(14, 4), dpi=100, layout='constrained')
  today, first, core = picture.subplots(1, 3)
  x = np.arange(1, most + 1)
  for i, (name, lives) in enumerate(chosen.items()):
    style = {'label': name, 'color': f'C{i % 10}', 'marker': 'o'}
    after = [[row['after'][-1] for row in rows[1:]] for rows in lives]
    today.plot(x, np.mean(after, 0), **style)
    if 'before' in lives[0][1]:
      before = [[row['before'] for row in rows[1:]] for rows in lives]
      today.plot(x, np.mean(before, 0), color=style['color'], linestyle=':')
    oldest = [[row['after'][0] for row in rows[1:]] for rows in lives]
    first.plot(x, np.mean(oldest, 0), **style)
    losses = [[row['core'] / w[0]['core'] - 1 for row in w] for w in lives]
    core.plot(np.arange(most + 1), 100 * np.mean(losses, 0), **style)
  for axes, title in (
    (today, "recall of the day's facts (dotted: before the night)"),
    (first, "recall of day 1's facts"),
    (core, 'core loss, rise in %'),
  ):
    axes.set(xlabel='night', title=title)
    axes.grid(alpha=0.3)
  core.legend(loc='center left', bbox_to_anchor=(1, 0.5))
  picture.savefig(path)
