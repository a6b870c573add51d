"""What came of the evaluations' cells: results.jsonl, table.md, NAME.png."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import figure

from nestax.launch import lock
from nestax.launch.benches import timing
from nestax.launch.evals import cells, suite


class Score(NamedTuple):
  """One number of the table, over the seeds; nan if one is not finite."""

  mean: float
  spread: float  # standard deviation, n - 1 in its denominator
  seeds: int


class Board(NamedTuple):
  """All scores of one evaluation; columns in order of appearance."""

  evaluation: suite.Evaluation
  scores: dict[str, dict[tuple[str, str], Score]]  # model -> (task, score)
  columns: list[tuple[str, str]]


def write(
  evaluations: Sequence[suite.Evaluation],
  workdir: pathlib.Path,
  rows: Sequence[dict],
) -> str:
  """Reports all cells of the evaluations that the workdir holds.

  Args:
    evaluations: which.
    workdir: of `running.run`; the files are written there.
    rows: what `running.run` gave, whose order models and tasks are shown in;
      cells of other models come after them.

  Returns:
    The tables.
  """
  # what ends meanwhile is reported by its own process, after this one
  with lock.free(workdir / '.report.lock', wait=True):
    return _write(evaluations, workdir, rows)


def _write(evaluations, workdir, rows) -> str:
  grouped = _grouped(evaluations, workdir, rows)
  lines = ''.join(json.dumps(_line(cell)) + '\n' for cell in grouped)
  cells.whole(workdir / 'results.jsonl', lines)
  boards = [_boards(one, grouped) for one in evaluations]
  boards = [those for those in boards if those]
  words = '\n\n'.join(table(board) for those in boards for board in those)
  cells.whole(workdir / 'table.md', words + '\n')
  for first, *_ in boards:
    draw(first, workdir / f'{first.evaluation.name}.png')
  return words


def _grouped(evaluations, workdir, rows) -> list[list[dict]]:
  """The rows of every cell: those given first, in their order."""
  found = list(rows)
  for one in evaluations:
    for path in sorted(suite.folder(workdir, one.name).glob('*.json')):
      found += cells.read(path)
  grouped = {}
  for row in found:
    cell = row['suite'], row['task'], row['model']
    grouped.setdefault(cell, {})[row['seed']] = row
  return [list(by_seed.values()) for by_seed in grouped.values()]


def _line(rows: list[dict]) -> dict:
  names = {name: rows[0][name] for name in ('suite', 'task', 'model')}
  scores = {}
  for name in dict.fromkeys(n for row in rows for n in row['scores']):
    score = _score(rows, name)
    scores[name] = {
      'mean': _finite(score.mean),
      'spread': _finite(score.spread),
      'values': [row['scores'].get(name) for row in rows],
    }
  seeds = [row['seed'] for row in rows]
  # seeds that were added later took a time of their own, on a machine perhaps
  times = dict.fromkeys((row['device'], row['seconds']) for row in rows)
  device = ' and '.join(dict.fromkeys(device for device, _ in times))
  rest = {'device': device, 'seconds': round(sum(s for _, s in times), 3)}
  return names | {'seeds': seeds, 'scores': scores} | rest


def _finite(x: float) -> float | None:
  return x if math.isfinite(x) else None


def _score(rows: list[dict], name: str) -> Score:
  values = [row['scores'].get(name) for row in rows]
  values = np.array([math.nan if x is None else x for x in values])
  spread = values.std(ddof=1) if len(values) > 1 else 0.0
  return Score(float(values.mean()), float(spread), len(values))


def _boards(evaluation, grouped) -> list[Board]:
  """Its table, after that of the groups' means where there are any."""
  whole = _board(evaluation, grouped)
  if not whole.scores:
    return []
  if not evaluation.groups:
    return [whole]
  note = (
    f"{evaluation.source}'s numbers are means over all settings of a task: "
    'they stand where all of them were run.'
  )
  alone = evaluation._replace(paper={}, words=f'{evaluation.words} {note}')
  many = {name: len(tasks) for name, tasks in evaluation.grouped().items()}
  counts = ', '.join(f'{name} {count}' for name, count in many.items())
  words = f'{evaluation.words} Means over the settings of a task: {counts}.'
  of_means = evaluation._replace(words=words)
  means = _board(of_means, _means(evaluation, grouped))
  tasks = [task for tasks in evaluation.grouped().values() for task in tasks]
  columns = sorted(whole.columns, key=lambda column: _place(tasks, column[0]))
  rest = whole._replace(evaluation=alone, columns=columns)
  return [means, rest] if means.scores else [rest]


def _means(evaluation, grouped) -> list[list[dict]]:
  """Rows of groups: what a seed has on average in all tasks of one."""
  cells = {
    (rows[0]['model'], rows[0]['task']): {row['seed']: row for row in rows}
    for rows in grouped
    if rows[0]['suite'] == evaluation.name
  }
  made = []
  for model in dict.fromkeys(model for model, _ in cells):
    for group, tasks in evaluation.grouped().items():
      parts = [cells.get((model, task), {}) for task in tasks]
      name = {'suite': evaluation.name, 'task': group, 'model': model}
      rows = [
        name | {'seed': seed, 'scores': _mean([part[seed] for part in parts])}
        for seed in parts[0]
        if all(seed in part for part in parts)
      ]
      made += [rows] if rows else []
  return made


def _place(tasks: list[str], task: str) -> int:
  return tasks.index(task) if task in tasks else len(tasks)


def _mean(rows: list[dict]) -> dict[str, float | None]:
  """Of the scores that all of them have."""
  found = {}
  for name in rows[0]['scores']:
    if not all(name in row['scores'] for row in rows):
      continue
    values = [row['scores'][name] for row in rows]
    found[name] = None if None in values else sum(values) / len(values)
  return found


def _board(evaluation, grouped) -> Board:
  scores, columns = {}, {}
  for rows in grouped:
    if rows[0]['suite'] != evaluation.name:
      continue
    for name in rows[0]['scores']:
      column = rows[0]['task'], name
      columns[column] = None
      line = scores.setdefault(rows[0]['model'], {})
      line[column] = _score(rows, name)
  return Board(evaluation, scores, list(columns))


def headings(board: Board) -> list[str]:
  """The columns' names: the task, and the score if the task has several."""
  tasks = [task for task, _ in board.columns]
  return [
    task if tasks.count(task) == 1 else f'{task} {name}'.strip()
    for task, name in board.columns
  ]


def table(board: Board) -> str:
  """A title, the table as Markdown, and what its numbers are."""
  one = board.evaluation
  names = headings(board)
  lines = [
    [model, *_cells(line, board.columns, one.decimals)]
    + ['-' if one.mixed else _average(line, board.columns)]
    + ['/'.join(sorted({str(score.seeds) for score in line.values()}))]
    for model, line in board.scores.items()
  ]
  for model, numbers in one.paper.items():
    known = [numbers.get(name) for name in names]
    if any(x is not None for x in known):
      words = ['-' if x is None else f'{x:g}' for x in known]
      lines.append([f'{model} ({one.source})', *words, '-', '-'])
  head = ['model', *names, 'average', 'seeds']
  words = f'{one.words} Mean ± standard deviation over seeds.'
  return f'{one.name}\n\n{timing.markdown(head, lines)}\n\n{words}'


def _cells(line, columns, decimals: int) -> list[str]:
  return [_words(line[c], decimals) if c in line else '-' for c in columns]


def _words(score: Score, decimals: int) -> str:
  """The mean, and the spread where there are seeds to spread."""
  mean = f'{score.mean:.{decimals}f}'
  return f'{mean} ± {score.spread:.{decimals}f}' if score.seeds > 1 else mean


def _average(line, columns) -> str:
  """Over all columns; of a model that lacks one there is none."""
  if any(column not in line for column in columns):
    return '-'
  return f'{np.mean([line[column].mean for column in columns]):.1f}'


def draw(board: Board, path: pathlib.Path) -> None:
  """Draws bars by column, or a panel a task with lines along the axis."""
  # Without pyplot: no window, no global state, no backend to choose.
  if board.evaluation.axis:
    _lines(board).savefig(path)
  else:
    _bars(board).savefig(path)


def _bars(board: Board) -> figure.Figure:
  names, models = headings(board), list(board.scores)
  picture = figure.Figure(
    figsize=(2 + 0.4 * len(names) * max(2, len(models)), 4),
    dpi=100,
    layout='constrained',
  )
  axes = picture.add_subplot()
  width = 0.8 / len(models)
  for i, model in enumerate(models):
    line = [board.scores[model].get(c, _NOTHING) for c in board.columns]
    axes.bar(
      np.arange(len(names)) + (i - (len(models) - 1) / 2) * width,
      [score.mean for score in line],
      width,
      yerr=[score.spread for score in line],
      label=model,
    )
  axes.set_xticks(range(len(names)), names, rotation=30, ha='right')
  axes.set(title=board.evaluation.name)
  axes.grid(alpha=0.3, axis='y')
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))
  return picture


def _lines(board: Board) -> figure.Figure:
  tasks = list(dict.fromkeys(map(_panel, board.columns)))
  picture = figure.Figure(
    figsize=(1.5 + 3 * len(tasks), 3.2), dpi=100, layout='constrained'
  )
  panels = picture.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
  for task, axes in zip(tasks, panels):
    for model, line in board.scores.items():
      points = sorted(
        (float(column[1].split()[-1]), score)
        for column, score in line.items()
        if _panel(column) == task
      )
      axes.errorbar(
        [x for x, _ in points],
        [score.mean for _, score in points],
        [score.spread for _, score in points],
        label=model,
        marker='.',
      )
    axes.set(title=task, xlabel=board.evaluation.axis, xscale='log')
    axes.grid(alpha=0.3)
  panels[-1].legend(loc='center left', bbox_to_anchor=(1, 0.5))
  return picture


def _panel(column: tuple[str, str]) -> str:
  """The column's name without the number along the axis."""
  task, name = column
  return ' '.join([task, *name.split()[:-1]]).strip()


_NOTHING = Score(math.nan, 0.0, 0)
