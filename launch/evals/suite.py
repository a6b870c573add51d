"""Evaluations by the cell: what one is, and what runs it.

`nestax-evaluate --suite=NAME,... --workdir=W --models=M,...` goes through the
cells of each evaluation and writes W/NAME/cells/*.json, one a cell, whole or
not at all; the same command does only what is not there. From them come
W/results.jsonl (a line a cell), W/table.md and W/NAME.png.

To add an evaluation write one module of `launch/evals` that ends in

    EVALUATION = suite.Evaluation(
      name='recall',
      options=Options(),   # frozen dataclass; --set=recall.KEY=VALUE
      cells=cells,         # (options, asked) -> cells, nothing computed yet
      words='Share of answers that are right, %.',
      paper={'Hope': {'easy': 100.0}},
      source='NL, Table 9',
    )

and name it in `suites.EVALUATIONS`. A cell is one column group of the table
(its task) for one model: `cells` yields

    suite.Cell(task='easy', model='hope', key={...}, run=run)

where `run(say)` does the work, tells `say(done, of)` how far it is, and returns
a dict a seed: `{'seed': 0, 'scores': {'accuracy': 99.5}, ...}`. Scores are
averaged over seeds and shown under `task` or, if the task has several, under
`task score`; whatever else stands in the dict (a learning rate, seconds) is
kept in the cell. `key` is a plain dict of all that the scores depend on, so
that a workdir of other settings is refused; of fewer `seeds` it is added to by
the cell's `more`, if it has one. Models are words that an
evaluation reads as it likes: names of families to train (`entrants.config`),
folders of runs or pretrained files (`entrants.load`).

An evaluation that trains small models from generated batches need not write
`cells` itself: `trials.cells` makes them of `problems.Problem`s, each a
function that gives batches and one that scores logits.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import rich.progress as bars
from rich import console

from nestax.launch import overrides
from nestax.launch.benches import timing
from nestax.launch.evals import cells

Say = Callable[[int, int], None]  # done, of


class Cell(NamedTuple):
  """A piece of work that is done whole or not at all.

  Attributes:
    task: heading of its columns; '' if the scores' names say all.
    model: its line of the table.
    key: plain dict of all that the scores depend on.
    run: does it; gives a dict a seed, with `seed` and `scores`.
    check: raises what can be said at once of a cell that is to be run, such as
      of a model that is not there.
    more: with rows of the first seeds of `key['seeds']`, and `say`: the rows of
      all; None where they cannot be added to.
  """

  task: str
  model: str
  key: dict
  run: Callable[[Say], list[dict]]
  check: Callable[[], None] = lambda: None
  more: Callable[[list[dict], Say], list[dict]] | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
  """What the command line asks of every evaluation.

  Attributes:
    models: words, see `entrants`.
    seeds: 0 to seeds - 1 are run.
    steps: of training; 0 for the evaluation's own.
    rates: learning rates; () for the evaluation's own.
    tasks: only these; () for all.
    workdir: for what an evaluation keeps beside its cells.
  """

  models: tuple[str, ...]
  seeds: int = 3
  steps: int = 0
  rates: tuple[float, ...] = ()
  tasks: tuple[str, ...] = ()
  workdir: pathlib.Path = pathlib.Path('runs/suite')


class Evaluation(NamedTuple):
  """What there is to know of one evaluation before it runs.

  Attributes:
    name: on the command line.
    options: frozen dataclass with the defaults, for --set=NAME.KEY=VALUE.
    cells: (options, asked) -> cells.
    words: what the numbers are, under the table; higher is better.
    paper: line -> column -> number, to stand beside ours.
    source: where those are from.
    axis: '' for bars; else the last word of every score's name is a number
      along this axis.
    decimals: of the table's numbers.
    mixed: the scores are of different units; no average is taken of them.
    groups: options -> name -> the tasks that are settings of one task of a
      benchmark whose score, as `paper` has it, is their mean; the table begins
      with these means. --tasks takes the names too.
  """

  name: str
  options: Any
  cells: Callable[[Any, Asked], Iterator[Cell]]
  words: str
  paper: Mapping[str, Mapping[str, float]] = {}
  source: str = ''
  axis: str = ''
  decimals: int = 1
  mixed: bool = False
  groups: Callable[[Any], Mapping[str, Sequence[str]]] | None = None

  def grouped(self) -> Mapping[str, Sequence[str]]:
    """The groups with the options as they are."""
    return self.groups(self.options) if self.groups else {}


def configure(
  evaluations: Sequence[Evaluation], words: Sequence[str]
) -> list[Evaluation]:
  """Gives the evaluations with `--set` words such as `mad.train.batch=8` set.

  Raises:
    ValueError: naming the word and what would be right.
  """
  names = [evaluation.name for evaluation in evaluations]
  made = []
  for word in words:
    if word.partition('.')[0] not in names:
      raise ValueError(
        f'--set={word}: begin with the evaluation, one of '
        f'{", ".join(names)}, as in {names[0]}.KEY=VALUE'
      )
  for one in evaluations:
    own = [w.partition('.')[2] for w in words if w.startswith(one.name + '.')]
    made.append(one._replace(options=overrides.apply(one.options, own)))
  return made


def run(evaluations: Sequence[Evaluation], asked: Asked) -> list[dict]:
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
  for one, cell in todo:
    if not _path(one, cell, asked.workdir).exists():
      cell.check()
  with _progress(len(todo)) as progress:
    return [
      row
      for one, cell in todo
      for row in _do(one, cell, asked.workdir, progress)
    ]


def folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Where the cells of an evaluation are."""
  return workdir / name / 'cells'


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


def _path(one, cell, workdir) -> pathlib.Path:
  return folder(workdir, one.name) / f'{slug(cell.task, cell.model)}.json'


def _do(one, cell, workdir, progress) -> list[dict]:
  path = _path(one, cell, workdir)
  names = {'suite': one.name, 'task': cell.task, 'model': cell.model}
  key = json.loads(json.dumps(names | cell.key))  # tuples come back as lists
  words = ' '.join(filter(None, names.values()))  # a task may have no name
  there = cells.fewer(path, key) if cell.more else None
  rows = cells.read(path, key) if there is None else None
  if rows is None:
    began, say = time.perf_counter(), progress.begin(words)
    made = cell.run(say) if there is None else cell.more(there, say)
    seconds = round(time.perf_counter() - began, 3)
    added = names | {'device': timing.device(), 'seconds': seconds}
    rows = [added | _plain(row) for row in made]  # one of before has its own
    cells.write(path, key, rows)
  progress.end(words, rows)
  return rows


def slug(*words: str) -> str:
  """A file's name of words."""
  return '_'.join(re.sub(r'[^\w.=+-]+', '-', word).strip('-') for word in words)


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

  def begin(self, words: str) -> Say:
    self._bar.reset(self._one, description=words, total=1, visible=True)
    if not self._terminal:  # it compiles first, which can take minutes
      self._line(f'{words}: begun')

    def say(done: int, of: int) -> None:
      self._bar.update(self._one, completed=done, total=of)

    return say

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
