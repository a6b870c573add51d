"""Runs that do not fit in memory side by side are done in several programs."""

import dataclasses

import jax
import pytest
from echo_cases import PROBLEM, TRAINING

from nestax.launch import room
from nestax.launch.evals import fitting, suite, sweep, trials

FULL = 'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16.16GiB'
SHARED = (
  'RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 129048, '
  'available: 101376, context: []'
)


def _room_for(most, done):
  def run(rates, seeds):
    if len(rates) * len(seeds) > most:
      raise jax.errors.JaxRuntimeError(FULL)
    done.append((rates, seeds))
    return [{'rate': r, 'seed': s} for r in rates for s in seeds]

  return run


@pytest.mark.parametrize('most', (1, 2, 3, 5, 6, 100))
def test_every_run_is_done_once_in_programs_that_fit(most, caplog):
  done = []
  rows = fitting.by_halves(_room_for(most, done), (0.1, 0.2, 0.3), range(1, 6))
  ran = sorted((row['rate'], row['seed']) for row in rows)
  assert ran == [(r, s) for r in (0.1, 0.2, 0.3) for s in range(1, 6)]
  assert all(len(rates) * len(seeds) <= most for rates, seeds in done)
  # rates first: the seeds of one are compared as long as they fit together
  assert all(len(r) == 1 for r, s in done if s != range(1, 6))
  if most >= 5:  # no further than it has to be
    assert {s for _, s in done} == {range(1, 6)}
  said = '15 runs side by side do not fit in memory' in caplog.text
  assert said == (most < 15)


def test_a_run_too_large_alone_and_other_failures_are_not_halved():
  calls = []

  def run(words, rates, seeds):
    calls.append((rates, seeds))
    raise jax.errors.JaxRuntimeError(words)

  for words, tries in (FULL, 3), (SHARED, 1), ('INTERNAL: other', 1):
    calls.clear()
    with pytest.raises(jax.errors.JaxRuntimeError, match=words[:8]):
      fitting.by_halves(lambda *a, w=words: run(w, *a), (1,), range(4))
    assert len(calls) == tries


def test_seeds_in_programs_of_their_own_score_as_side_by_side(monkeypatch):
  training = dataclasses.replace(TRAINING, rates=(3e-2,), evaluations=4)
  asked = suite.Asked(('transformer',), seeds=3)
  (cell,) = trials.cells([PROBLEM], training, asked)
  together = cell.run(lambda done, of: None)
  run, sizes = sweep.run, []

  def small(task, make, rates, seeds, steps, every, say, enough, first):
    sizes.append(seeds - first)
    if seeds - first > 1:
      say(every, 0.0)  # full midway
      say(2 * every, 1e6)
      raise jax.errors.JaxRuntimeError(FULL)
    return run(task, make, rates, seeds, steps, every, say, enough, first)

  monkeypatch.setattr(sweep, 'run', small)
  said = []
  rows = cell.run(lambda *far: said.append(far))
  assert sizes == [3, 1, 2, 1, 1]
  # the bar goes on, to its end, whatever had to be done again
  assert said == sorted(said) and said[-1] == 2 * (training.steps,)
  assert said[-2][0] < training.steps and len({far for far, _ in said}) > 3
  assert [row['seed'] for row in rows] == [0, 1, 2]
  for row, other in zip(rows, together):
    assert row['scores'] == pytest.approx(other['scores'], abs=1e-3)
    assert row['losses'] == pytest.approx(other['losses'], rel=1e-4)
    assert row['step_ms'] < 1e6  # of what was trained alone


@pytest.mark.parametrize('apart', (False, True))
def test_what_does_not_fit_alone_ends_in_words(monkeypatch, tmp_path, apart):
  training = dataclasses.replace(TRAINING, rates=(3e-2,), apart=apart)
  asked = suite.Asked(('transformer',), seeds=2, workdir=tmp_path)
  (cell,) = trials.cells([PROBLEM], training, asked)
  error = FULL

  def full(*_, **__):
    raise jax.errors.JaxRuntimeError(error)

  monkeypatch.setattr(trials.sweep, 'run', full)
  monkeypatch.setattr(trials.serial, 'run', full)
  words = (
    f'^{PROBLEM.name} transformer: .*no room .* {training.batch} rows.*'
    r'16\.16GiB at once.*train\.batch'
  )
  with pytest.raises(room.OutOfMemory, match=words):
    cell.run(lambda done, of: None)
  error = SHARED
  with pytest.raises(room.OutOfMemory, match='129048.*implementation=scan'):
    cell.run(lambda done, of: None)
  error = 'INTERNAL: other'
  with pytest.raises(jax.errors.JaxRuntimeError, match='other'):
    cell.run(lambda done, of: None)


def test_rows_that_do_not_fit_and_a_name_that_is_none(monkeypatch):
  """Data too large for the device; a suite of one problem."""
  (cell,) = trials.cells(
    [PROBLEM._replace(name='')],
    TRAINING,
    suite.Asked(('transformer',), seeds=1),
  )

  def full(*_, **__):
    raise jax.errors.JaxRuntimeError(FULL)

  monkeypatch.setattr(trials.trainable, 'make_task', full)
  with pytest.raises(room.OutOfMemory, match='^transformer: the device'):
    cell.run(lambda done, of: None)


def test_a_sweep_that_does_not_fit_is_done_by_halves(monkeypatch):
  done = []

  def small(task, make, rates, seeds, steps, every, say, first):
    if len(rates) * (seeds - first) > 1:
      raise jax.errors.JaxRuntimeError(FULL)
    done.append((*rates, first, seeds, steps, every, say))
    return [first]

  monkeypatch.setattr(sweep, 'run', small)
  rows = fitting.run(None, None, (0.1, 0.2), 2, 8, 4, say='told')
  assert rows == [0, 1, 0, 1]
  ends = 8, 4, 'told'
  assert done == [(r, s, s + 1, *ends) for r in (0.1, 0.2) for s in (0, 1)]
