"""Does the cells that are not done yet, and shows how far it is.

Processes with one workdir share its cells, where the file system has locks:
each is done by the first that comes to it, which holds a file beside it for as
long. Who has nothing else to do waits, and takes over what is let go of undone.
"""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import rich.progress as bars
from rich import console

from nestax.launch import lock
from nestax.launch.benches import timing
from nestax.launch.evals import cells, suite

_WAIT = 2.0  # seconds until what others are at is looked for again


def run(
  evaluations: Sequence[suite.Evaluation], asked: suite.Asked
) -> list[dict]:
  """Does all cells that are not done yet.

  Returns:
    The rows of all cells asked for, old and new, in order: what `Cell.run`
    gave, with `suite`, `task`, `model`, `device` and the cell's `seconds`.

  Raises:
    cells.CellError: if the workdir holds cells of other settings.
    ValueError: for tasks that no evaluation has, or as an evaluation does.
  """
  todo = [
    (one, cell) for one in evaluations for cell in one.cells(one.options, asked)
  ]
  if asked.tasks:
    groups = [one.grouped() for one in evaluations]
    _check_tasks(asked.tasks, [cell.task for _, cell in todo], groups)
    wanted = {x for g in groups for n in asked.tasks for x in g.get(n, [n])}
    todo = [pair for pair in todo if pair[1].task in wanted]
    _say_left_out(evaluations, todo, asked.tasks)
  work = [_work(one, cell, asked.workdir) for one, cell in todo]
  for each in work:
    if not each.so_far()[0]:
      each.cell.check()
  with _progress(len(work)) as progress:
    found = _all(work, progress)
  return [row for rows in found for row in rows]


class _Work(NamedTuple):
  """A cell, and its file."""

  cell: suite.Cell
  names: dict[str, str]  # of its suite, task and model
  key: dict
  path: pathlib.Path

  @property
  def words(self) -> str:
    # a task may have no name
    return ' '.join(filter(None, self.names.values()))

  def so_far(self) -> tuple[list[dict], bool]:
    """See `cells.so_far`."""
    return cells.so_far(self.path, self.key, bool(self.cell.more))


def _work(one: suite.Evaluation, cell: suite.Cell, workdir) -> _Work:
  names = {'suite': one.name, 'task': cell.task, 'model': cell.model}
  key = json.loads(json.dumps(names | cell.key))  # tuples come back as lists
  file = f'{suite.slug(cell.task, cell.model)}.json'
  return _Work(cell, names, key, suite.folder(workdir, one.name) / file)


def _all(work: Sequence[_Work], progress) -> list[list[dict]]:
  """The rows of all cells; those that other processes are at come last."""
  found: dict[int, list[dict]] = {}
  while len(found) < len(work):
    left = [i for i in range(len(work)) if i not in found]
    for i in left:
      rows = _do(work[i], progress)
      if rows is not None:
        found[i] = rows
    if not any(i in found for i in left):
      progress.wait([work[i].words for i in left])
      time.sleep(_WAIT)
  return [found[i] for i in range(len(work))]


def _check_tasks(wanted, known, groups) -> None:
  known = [*(name for group in groups for name in group), *known]
  for task in wanted:
    if task not in known:
      known = ', '.join(dict.fromkeys(known))
      raise ValueError(f'--tasks={task}: the tasks are {known}')


def _say_left_out(evaluations, todo, tasks) -> None:
  kept = {one.name for one, _ in todo}
  out = [one.name for one in evaluations if one.name not in kept]
  if out:
    print(
      f'--tasks={",".join(tasks)}: {", ".join(out)} left out, without any of '
      'these',
      file=sys.stderr,
    )


def _do(work: _Work, progress) -> list[dict] | None:
  """A cell's rows; None while another process is at it."""
  rows, every = work.so_far()
  if not every:
    path = work.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock.free(path.with_name(f'.{path.stem}.lock')) as mine:
      if not mine:
        return None
      rows, every = work.so_far()  # another may just have ended
      if not every:
        rows = _made(work, rows, progress.begin(work.words))
        cells.write(path, work.key, rows)
  progress.end(work.words, rows)
  return rows


def _made(work: _Work, there: list[dict], say: suite.Say) -> list[dict]:
  """Runs a cell, or its seeds that are not there."""
  began, cell = time.perf_counter(), work.cell
  made = cell.more(there, say) if there else cell.run(say)
  seconds = round(time.perf_counter() - began, 3)
  added = work.names | {'device': timing.device(), 'seconds': seconds}
  return [added | _plain(row) for row in made]  # one of before has its own


def _plain(row: dict) -> dict:
  """The row as JSON keeps it; what is not finite is None."""
  scores = {
    str(name): float(x) if x is not None and math.isfinite(x) else None
    for name, x in row['scores'].items()
  }
  return row | {'scores': scores}


class _Shown:
  """Two bars on a terminal, the suite's and the cell's; lines elsewhere."""

  def __init__(self, bar: bars.Progress, cells: int):
    self._bar, self._terminal = bar, bar.console.is_terminal
    self._all = bar.add_task('all cells', total=cells)
    self._one = bar.add_task('', total=1, visible=False)
    self._awaited: list[str] = []

  def begin(self, words: str) -> suite.Say:
    self._bar.reset(self._one, description=words, total=1, visible=True)
    if not self._terminal:  # it compiles first, which can take minutes
      self._line(f'{words}: begun')

    def say(done: int, of: int) -> None:
      self._bar.update(self._one, completed=done, total=of)

    return say

  def wait(self, cells: list[str]) -> None:
    if cells != self._awaited:
      self._line(f'waiting for other processes: {", ".join(cells)}')
    self._awaited = cells

  def end(self, words: str, rows: list[dict]) -> None:
    self._bar.advance(self._all)
    self._bar.update(self._one, visible=False)
    self._line(f'{words}: {summary(rows)}')

  def _line(self, line: str) -> None:
    self._bar.console.print(line, highlight=False, soft_wrap=True)


def summary(rows: Sequence[dict]) -> str:
  """Every score's mean over the seeds, in a line."""
  names = dict.fromkeys(name for row in rows for name in row['scores'])
  said = []
  for name in names:
    values = [row['scores'].get(name) for row in rows]
    good = [x for x in values if x is not None]
    mean = sum(good) / len(good) if len(good) == len(values) else math.nan
    said.append(f'{name} {mean:.4g}')
  return ', '.join(said)


@contextlib.contextmanager
def _progress(cells: int):
  columns = (
    bars.TextColumn('{task.description}'),
    bars.BarColumn(),
    bars.MofNCompleteColumn(),
    bars.TimeRemainingColumn(),
  )
  with bars.Progress(*columns, console=console.Console(stderr=True)) as bar:
    yield _Shown(bar, cells)
