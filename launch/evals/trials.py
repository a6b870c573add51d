"""Small models trained from generated rows: the cells of such evaluations.

Every problem gets every model at every learning rate and seed; all runs of a
cell are one program (`sweep`), or several where that does not fit in memory
(`fitting`), or one after another, each kept as it ends (`serial`,
`Training.apart`). The rate is picked by the mean over seeds of the scores on
rows that are no tests: 'valid'. The scores are those of the last step, or of
the evaluation on the way that was best by `valid` (`Training.best`).

Rows are drawn once, by a generator seeded with what they are for; seeds of
runs choose first parameters and the order of rows. AdamW for all, clipped at
norm 1; unless an evaluation says otherwise a warm-up over a tenth of the steps,
then half a cosine.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from nestax.launch.benches import timing
from nestax.launch.evals import (
  entrants,
  fitting,
  haystack,
  picking,
  serial,
  suite,
  sweep,
  trainable,
)
from nestax.launch.evals.problems import Problem
from nestax.launch.evals.training import Training
from nestax.models.config import ModelConfig


def cells(
  tasks: Sequence[Problem],
  training: Training,
  asked: suite.Asked,
  timed: bool = False,
) -> Iterator[suite.Cell]:
  """Makes the cells of problems, one for each and each of `asked.models`.

  Args:
    tasks: what is trained and tested.
    training: how.
    asked: by the command line.
    timed: scores tell how long steps take, so that no two words are the same.

  Raises:
    ValueError: for a model that is none of the families, or steps too few for
      a problem's early rows.
  """
  training = training.asked(asked)
  for problem in tasks:
    for steps in filter(None, (training.steps, training.trial)):
      sweep.plan(len(problem.early), problem.share, steps, training.every)
    base = training.base(problem.V) | problem.base
    configs = {w: entrants.config(w, base, problem.own) for w in asked.models}
    named = (lambda word: word) if timed else entrants.name
    # the last of those whose results are the same
    words = {named(word): word for word in configs}
    for word in asked.models:
      if word != words[named(word)]:
        _say_once(
          f'{word}: not run, as it gives what {words[named(word)]} does'
        )
    for name, word in words.items():
      cfg = configs[word]
      key = problem.key | {'training': dataclasses.asdict(training)}
      of = dataclasses.asdict if timed else entrants.result_key
      key |= {'seeds': asked.seeds, 'config': of(cfg)}

      kept = _kept(asked, problem.name, name, key) if training.apart else None

      def run(say, problem=problem, cfg=cfg, kept=kept):
        return train(problem, cfg, training, asked.seeds, say, kept)

      def more(rows, say, run=run, problem=problem, cfg=cfg):
        if training.apart:  # what is there has been kept by the run
          return run(say)
        added = train(problem, cfg, training, asked.seeds, say, first=len(rows))
        return [*rows, *added]

      # a rate is picked over all seeds, so that side by side with others the
      # first seeds' scores could change
      alone = training.apart or len(training.rates) == 1
      more = more if alone else None
      yield suite.Cell(problem.name, name, key, run, more=more)


@functools.cache
def _say_once(words: str) -> None:
  logging.getLogger(__name__).warning('--models=%s', words)


def _kept(asked: suite.Asked, task: str, name: str, key: dict) -> serial.Kept:
  """Of other rates, seeds or trials a run is the same one.

  Not of another device, since a row tells how long a step took.
  """
  key = json.loads(json.dumps(key | {'device': timing.device()}))
  del key['seeds'], key['training']['rates'], key['training']['trial']
  folder = suite.slug(task, name, haystack.digest(json.dumps(key)))
  return serial.Kept(asked.workdir / 'runs' / folder, key)


def train(
  problem: Problem,
  cfg: ModelConfig,
  training: Training,
  seeds: int,
  say: suite.Say = lambda done, of: None,
  kept: serial.Kept | None = None,
  first: int = 0,
) -> list[dict]:
  """Trains all rates and seeds; gives a row a seed, of the rate picked.

  Seeds from `first` on, where runs are side by side.

  Returns:
    As `suite.Cell.run`: beside the scores `rate`, whether it is at an `edge`
    of several rates, the `step` of the scores, its `valid` and valid `loss`,
    `last`: the scores of its last evaluation before it ended, the `losses` of
    the tests in nats a target (which fall long before whole answers are right),
    the `curve` of [step, valid, loss], `grid`: of every rate its mean `valid`
    (after a trial, at its end), and `step_ms`: of a step of all runs of one
    program, its share of evaluation in it; of runs apart, of a step alone.
  """
  trains = (
    functools.partial(_apart, kept)
    if training.apart
    else functools.partial(_together, first)
  )

  def enough(rows):
    return picking.all_ended(rows, training.rule)

  what = ' '.join(filter(None, (problem.name, cfg.family)))
  with fitting.in_words(what, training.batch):
    task = trainable.make_task(problem, cfg, training, seeds)
    shapes = jax.eval_shape(task.init, task.data, jnp.int32(0))
    make = trainable.optimizer(shapes, training)
    rows, tried, ms = trains(task, make, training, seeds, say, enough)
  scored = picking.scored(rows, training.rule)
  compared = picking.scored(tried, picking.Rule()) if tried else scored
  rate, means = picking.pick(compared, training.rates)
  ends, runs = (min(training.rates), max(training.rates)), picking.by_run(rows)
  edge = len(training.rates) > 1 and rate in ends
  made = []
  for row in scored:
    if row['rate'] != rate:
      continue
    run = training.rule.lived(runs[rate, row['seed']])
    scores = {name: row[f'test {name}'] for name in problem.tests}
    losses = {name: row[f'loss {name}'] for name in problem.tests}
    curve = [[r['step'], r['valid'], r['loss']] for r in run]
    about = {'rate': rate, 'edge': edge, 'step': row['step']}
    about |= {'valid': row['valid'], 'losses': losses}
    about |= {'last': {name: run[-1][f'test {name}'] for name in scores}}
    about |= {'loss': row['loss'], 'curve': curve, 'grid': means}
    about |= {'step_ms': ms(run)}
    made.append({'seed': row['seed'], 'scores': scores} | about)
  return made


def _apart(kept, task, make, training: Training, seeds: int, say, enough):
  """Rows of all runs and of the trial, and what a run's step took."""
  course = serial.Course(
    training.rates, seeds, training.steps, training.trial, training.every
  )
  rows, tried = serial.compare(task, make, course, kept, say, enough)
  return rows, tried, serial.step_ms


def _together(first, task, make, training: Training, seeds: int, say, enough):
  """The same of runs side by side, all of them or as many as fit in memory."""
  told, ended, far = [], 0, 0
  runs = len(training.rates) * (seeds - first)

  def side_by_side(rates, some):
    nonlocal ended
    mine = []  # of what does not fit after all nothing is to be counted
    many = len(rates) * len(some)

    def tell(step, seconds):
      nonlocal far
      mine.append((step, seconds))
      # of all runs, those that are done before and after these too; what did
      # not fit may have come further
      far = max(far, (ended * training.steps + many * step) // runs)
      say(far, training.steps)

    grid = some.stop, training.steps, training.every
    rows = sweep.run(task, make, rates, *grid, tell, enough, some.start)
    told.extend(mine)
    ended += many
    return rows

  rows = fitting.by_halves(side_by_side, training.rates, range(first, seeds))
  return rows, [], lambda run: sweep.step_ms(told)
