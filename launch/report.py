"""What a night says of itself: a table, a row, pictures, progress bars."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence

from rich import console, table
from rich import progress as bars

from nestax.launch import by_level, plots

# Of a night's table; the command's --help says what they mean.
HEAD = 'level', 'goes to', 'had written', 'divergence', 'slots used', 'merged'
EVERY = 20.0  # seconds between lines where there is no terminal


class Show:
  """A bar at a time on stderr; what is said scrolls by on stdout.

  Where stderr is no terminal, a line when something begins and now and then.
  """

  def __init__(self):
    columns = (
      *bars.Progress.get_default_columns(),
      bars.TextColumn('{task.fields[words]}'),
    )
    stderr = console.Console(stderr=True)
    self._lines, self._said = not stderr.is_terminal, 0.0
    self._bars = bars.Progress(*columns, console=stderr, transient=True)
    self._task, self._name = None, ''

  def __enter__(self) -> 'Show':
    if not self._lines:
      self._bars.start()
    return self

  def __exit__(self, *error) -> None:
    if not self._lines:
      self._bars.stop()

  def update(self, name: str, done: int, total: int, words: str = '') -> None:
    """Moves the bar of that name, which takes the place of another."""
    if self._lines:
      self._line(name, done, total, words)
      return
    if name != self._name:
      if self._task is not None:
        self._bars.remove_task(self._task)
      self._task, self._name = self._bars.add_task(name, words=''), name
    self._bars.update(self._task, completed=done, total=total, words=words)

  def _line(self, name: str, done: int, total: int, words: str) -> None:
    now = time.monotonic()
    if name == self._name and now - self._said < EVERY:
      return
    self._name, self._said = name, now
    to_stderr(f'{name}: {done}/{total}' + (f', {words}' if words else ''))

  def say(self, line: str) -> None:
    print(line, flush=True)


def night_row(
  number: int,
  slept,
  day: str,
  retention: dict[str, float | None],
  used: Sequence[int],
  slots: int,
  recall: dict | None = None,
) -> dict:
  """What a life keeps of a night: plain values, what is not finite is None.

  `by_level.row` makes a line of `night.jsonl` of it.

  Args:
    number: of the night.
    slept: what it came to; its metrics are of the model it proposed.
    day: name of the day before it.
    retention: by day, the loss of the model that woke up.
    used: slots that it uses, of each level.
    slots: that each level has.
    recall: what `quiz.row` says, if there are questions.
  """
  accepted = slept.decision.accepted
  metrics = {
    name: value if math.isfinite(value) else None
    for name, value in slept.metrics.items()
  }
  return {
    'night': number,
    'after_day': day,
    'accepted': accepted,
    'reason': slept.decision.reason,
    'owners': list(slept.owners),
    'core': metrics['core_after' if accepted else 'core_before'],
    'slots': slots,
    'used': list(used),
    'metrics': metrics,
    'seconds': slept.seconds,
    'retention': retention,
  } | ({'recall': recall} if recall else {})


def show_night(row: dict, periods: Sequence[int], out=None) -> None:
  """Prints what a night did, level by level, then its losses and its time."""
  m = row['metrics']
  grid = table.Table(
    title=f'night {row["night"]}, after day {row["after_day"]}'
  )
  for name in HEAD:
    grid.add_column(name, no_wrap=name == 'divergence')
  for k, period in enumerate(periods):
    to = periods[min(k + 1, len(periods) - 1)]
    lost = m.get(f'lost_{k}')
    grid.add_row(
      f'every {period}',
      f'every {to}' if to != period else 'own slots',
      _number(m.get(f'written_{k}')),
      _change(m, k),
      f'{row["used"][k]} of {row["slots"]}',
      '-' if lost is None else f'yes, {lost:.1%} lost',
    )
  shown = out or console.Console()
  shown.print(grid)
  shown.print(
    f'core loss {m["core_before"]:.4f} -> {m["core_after"]:.4f} nats a token; '
    f"day's text {m['day_before']:.4f} without the night, {m['day_dusk']:.4f} "
    f'with fast levels, {m["day_after"]:.4f} by slow weights alone',
    soft_wrap=True,
    highlight=False,
  )
  for line in _recall(row, periods):
    shown.print(line, soft_wrap=True, highlight=False)
  drift = [
    f'{_number(m[f"kept_{k}"])} (every {period})'
    for k, period in enumerate(periods)
    if f'kept_{k}' in m
  ]
  if drift:
    rows = m.get('rehearsed', 0)
    shown.print(
      f'to stay as it was: its own texts and {rows:.0f} rehearsed rows, '
      f'divergence {", ".join(drift)}',
      soft_wrap=True,
      highlight=False,
    )
  if 'pieces' in m:
    shown.print(
      f'left out by filters: {m["left_out"]:.0f} of {m["pieces"]:.0f} pieces',
      highlight=False,
    )
  if 'dream_paid' in m:
    shown.print(
      f'dreams: {m["dream_paid"]:.0%} helped; score {m["dream_before"]:.3f} -> '
      f'{m["dream_after"]:.3f}',
      soft_wrap=True,
      highlight=False,
    )
  spent = ', '.join(f'{k} {v:.1f} s' for k, v in row['seconds'].items())
  spent += f'; {sum(row["seconds"].values()):.1f} s in all'
  shown.print(f'{row["reason"]}\n{spent}', soft_wrap=True, highlight=False)


def _recall(row: dict, periods: Sequence[int]) -> list[str]:
  """What is known of what was slept on, and of all days."""
  m, lines = row['metrics'], []
  if 'recall_dusk' in m:
    lines.append(
      f'recall of what was slept on ({m["recall_asked"]:.0f} questions, chance '
      f'{_share(m["recall_chance"])}): {_share(m["recall_dusk"])} with fast '
      f'levels, {_share(m["recall_slow"])} -> {_share(m["recall_morning"])} by '
      'slow weights alone'
    )
    lines.append(
      f'by one level alone: {_by_level(m, "alone", periods)}; after the night '
      f'without the slots of one: {_by_level(m, "without", periods)}'
    )
  known = row.get('recall', {}).get('morning', {})
  if known:
    each = ', '.join(
      f'{f"day {day}" if day else "of no day"} {_share(share)}'
      for day, share in known.items()
    )
    lines.append(f'recall by slow weights alone: {each}')
  return lines


def _by_level(metrics: dict, name: str, periods: Sequence[int]) -> str:
  shares = [metrics.get(f'recall_{name}_{k}') for k in range(len(periods))]
  words = [
    f'every {period} {_share(share)}'
    for period, share in zip(periods, shares)
    if share is not None
  ]
  return ', '.join(words) or '-'


def _share(value: float | None) -> str:
  return '-' if value is None else f'{value:.0%}'


def _change(metrics: dict, k: int) -> str:
  for name in ('divergence', 'on_policy_divergence'):
    if f'{name}_{k}' in metrics:
      first = metrics.get(f'{name}_{k}_first')
      return f'{_number(first)} -> {_number(metrics[f"{name}_{k}"])}'
  return '-' if f'written_{k}' in metrics else 'not due'


def _number(value: float | None) -> str:
  return '-' if value is None else f'{value:.3g}'


def write(out, rows: Sequence[dict], days: Sequence[str], periods) -> None:
  """Writes `night.jsonl`, `retention.png` and `levels.png`.

  Args:
    out: the folder.
    rows: of all nights, from `night_row`.
    days: names.
    periods: of the levels.
  """
  out = pathlib.Path(out)
  told = [by_level.row(row, periods) for row in rows]
  fresh = out / 'night.jsonl.new'
  fresh.write_text(''.join(json.dumps(row) + '\n' for row in told))
  fresh.replace(out / 'night.jsonl')
  plots.retention(rows, days, out / 'retention.png')
  plots.usage(rows, periods, out / 'levels.png')


def to_stderr(line: str) -> None:
  print(line, file=sys.stderr)
