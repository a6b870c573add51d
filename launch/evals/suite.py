"""Evaluations by the cell: what one is, and what there is to know of it.

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

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nestax.launch import overrides

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


def folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Where the cells of an evaluation are."""
  return workdir / name / 'cells'


def slug(*words: str) -> str:
  """A file's name of words."""
  return '_'.join(re.sub(r'[^\w.=+-]+', '-', word).strip('-') for word in words)
