"""Pictures of a run."""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib import figure


def loss_curve(
  rows: Sequence[dict], path: str | os.PathLike, bigram: float, title: str
) -> None:
  """Draws bits per byte over the steps as a PNG.

  Args:
    rows: of `metrics.Log`; what was not finite leaves a gap.
    path: of the PNG.
    bigram: bits per byte of the validation bytes under their own bigrams.
    title: above the picture.
  """
  # Without pyplot: no window, no global state, no backend to choose.
  picture = figure.Figure(figsize=(7, 4.5), dpi=120, layout='constrained')
  axes = picture.add_subplot()
  for split, style in (
    ('train', {'linewidth': 0.8}),
    ('valid', {'marker': '.'}),
  ):
    points = [row for row in rows if row['split'] == split]
    axes.plot(
      [row['step'] for row in points],
      [_number(row['bits_per_byte']) for row in points],
      label=split,
      **style,
    )
  axes.axhline(bigram, color='grey', linestyle='--', label='bigram entropy')
  axes.set(xlabel='step', ylabel='bits per byte', title=title)
  axes.grid(alpha=0.3)
  axes.legend()
  picture.savefig(path)


def _number(value: float | None) -> float:
  return float('nan') if value is None else value


def _mark(k: int, points: int) -> dict:
  """How level k is drawn: what lies behind is larger, and all are hollow."""
  return {
    'marker': 'osD^vP'[k % 6],
    'markersize': 4 + 2 * max(0, 3 - k),
    'markevery': max(1, points // 20),
    'markerfacecolor': 'none',
    'linewidth': 0.8,
  }


def levels(
  readings, periods: Sequence[int], path: str | os.PathLike, title: str
) -> None:
  """Draws what a stream met and which level moved when, as a PNG.

  Args:
    readings: name of a way to read -> its `streaming.Reading`s.
    periods: of the levels that learn.
    path: of the PNG.
    title: above the picture.
  """
  picture = figure.Figure(figsize=(8, 6), dpi=120, layout='constrained')
  above, below = picture.subplots(2, 1, sharex=True)
  for name, rows in readings.items():
    at = [row.tokens for row in rows]
    nats = np.cumsum([row.nats for row in rows])
    size = np.cumsum([row.bytes for row in rows])
    bits = nats / np.log(2) / np.maximum(size, 1)
    above.plot(at, bits, label=f'levels {name}')
    if not len(rows) or not len(rows[0].moved):
      continue
    moved = np.stack([row.moved for row in rows])
    commits = np.stack([row.commits for row in rows])
    new = np.diff(commits, axis=0, prepend=0) > 0
    for level, period in enumerate(periods):
      shown = new[:, level]
      below.plot(
        np.asarray(at)[shown],
        moved[shown, level],
        marker='.',
        linewidth=0.8,
        label=f'{name}: every {period}',
      )
  above.set(ylabel='bits per byte so far', title=title)
  below.set(xlabel='tokens read', ylabel='norm of the last update')
  for axes in (above, below):
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize='small')
  picture.savefig(path)


def trained_levels(
  rows: Sequence[dict],
  periods: Sequence[int],
  path: str | os.PathLike,
  title: str,
) -> None:
  """Draws over the steps of a run what its levels do, as a PNG.

  A panel for each number of the levels, and for the surprise, if it is there.

  Args:
    rows: of `metrics.Log`; the numbers of `metrics.of_levels` are drawn.
    periods: of the levels that learn.
    path: of the PNG.
    title: above the picture.
  """
  shown = (
    ('rate', 'inner learning rate', 'rate'),
    ('moved', 'last update', 'norm'),
    ('size', 'all that is written', 'norm'),
  )
  rows = [row for row in rows if 'level_0_rate' in row]
  surprising = any('surprise' in row for row in rows)
  count = len(shown) + surprising
  size = (7, 2.5 * count)
  picture = figure.Figure(figsize=size, dpi=120, layout='constrained')
  panels = picture.subplots(count, 1, sharex=True)
  at = [row['step'] for row in rows]
  for (name, words, unit), axes in zip(shown, panels):
    for k, period in enumerate(periods):
      values = [_number(row[f'level_{k}_{name}']) for row in rows]
      axes.plot(at, values, label=f'every {period}', **_mark(k, len(at)))
    axes.set(title=words, ylabel=unit)
    axes.legend(fontsize='small')
  if surprising:
    values = [_number(row.get('surprise')) for row in rows]
    panels[-1].plot(at, values, 'k.-')
    panels[-1].set(
      title='surprise: loss of the levels on their last chunk', ylabel='loss'
    )
  for axes in panels:
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
  panels[-1].set(xlabel='step')
  # a run of one validation would have an axis of a few steps about it
  panels[-1].set_xlim(0, 1.05 * max(at, default=1))
  picture.suptitle(title, fontsize='medium')
  picture.savefig(path)


def retention(
  rows: Sequence[dict], days: Sequence[str], path: str | os.PathLike
) -> None:
  """Draws what is left of each day after each night, as a PNG.

  The loss of its text; where there are questions, below it the recall of them,
  with that of the evening before as a cross.

  Args:
    rows: from `report.night_row`, the first one before any night.
    days: names.
    path: of the PNG.
  """
  asked = any('recall' in row for row in rows)
  size = (7, 8) if asked else (7, 4.5)
  picture = figure.Figure(figsize=size, dpi=120, layout='constrained')
  axes, *below = np.ravel(picture.subplots(1 + asked, 1, sharex=True))
  nights = [row['night'] for row in rows]
  for name in days:
    losses = [_number(row['retention'].get(name)) for row in rows]
    axes.plot(nights, losses, marker='.', label=f'day {name}')
  core = [_number(row['core']) for row in rows]
  axes.plot(nights, core, 'k--', label='core')
  axes.set(
    ylabel='nats a token, slow weights alone',
    title="loss of each day's text",
    xticks=nights,
  )
  for each in below:
    _recall(rows, days, each)
  for each in (axes, *below):
    each.grid(alpha=0.3)
    each.legend(fontsize='small')
  (axes, *below)[-1].set(xlabel='nights slept')
  picture.savefig(path)


def _recall(rows: Sequence[dict], days: Sequence[str], axes) -> None:
  def of(name, row, day):
    return _number((row.get('recall', {}).get(name) or {}).get(day))

  nights = [row['night'] for row in rows]
  for day in (*days, ''):
    known = [of('morning', row, day) for row in rows]
    if not np.isfinite(known).any():
      # keeps the colours of the days
      axes.plot([], [])
      continue
    label = f'day {day}' if day else 'of no day'
    (line,) = axes.plot(nights, known, marker='.', label=label)
    dusk = [of('dusk', row, day) for row in rows]
    axes.plot(nights, dusk, 'x', color=line.get_color())
  axes.set(
    ylim=(-0.03, 1.03),
    ylabel='share of questions',
    title='recall by slow weights alone (x: the evening before, with levels)',
  )


def usage(
  rows: Sequence[dict], periods: Sequence[int], path: str | os.PathLike
) -> None:
  """Draws what each level had written and the slots it uses, as a PNG.

  Args:
    rows: from `report.night_row`.
    periods: of the levels.
    path: of the PNG.
  """
  picture = figure.Figure(figsize=(7, 6), dpi=120, layout='constrained')
  above, below = picture.subplots(2, 1, sharex=True)
  nights = [row['night'] for row in rows]
  for k, period in enumerate(periods):
    written = [_number(row['metrics'].get(f'written_{k}')) for row in rows]
    used = [row['used'][k] for row in rows]
    for axes, values in ((above, written), (below, used)):
      axes.plot(
        nights, values, label=f'every {period}', **_mark(k, len(nights))
      )
  above.set(ylabel='norm', title='what levels had written before each night')
  below.set(ylabel='slots', title='slots that levels use after it')
  below.set(xlabel='nights slept', xticks=nights)
  for axes in (above, below):
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
  picture.savefig(path)
