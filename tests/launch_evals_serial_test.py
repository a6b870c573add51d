"""Runs one after another are those side by side, and none is done twice."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestax.launch.evals import cells, orthogonal, serial, sweep

COURSE = serial.Course((0.1, 1e-4, 0.4), seeds=2, steps=6, trial=4, every=2)


def quadratic():
  """Comes near 3 soonest at the greatest rate; seeds begin elsewhere."""

  def evaluate(data, w, seed, step):
    loss = (w - data) ** 2
    return {'valid': -loss, 'loss': loss, 'test': loss + 0 * step + 0 * seed}

  return sweep.Task(
    jnp.float32(3.0),
    lambda data, seed: 0.5 * seed + 0.0 * data,
    lambda data, seed, step: data + 0.01 * step,
    lambda w, batch: (w - batch) ** 2,
    evaluate,
    'valid',
  )


def falling(rate, steps):
  """A schedule that depends on how many steps there are."""
  return optax.sgd(lambda count: rate * (1.0 - count / steps))


def by_hand(rate, seed, steps):
  w = 0.5 * seed
  for step in range(steps):
    slope = 2 * (w - 3.0 - 0.01 * step)
    w -= rate * (1.0 - step / steps) * slope
  return (w - 3.0) ** 2


def test_runs_one_by_one_are_those_side_by_side():
  task = orthogonal.task(2, 8, tasks=2, rank=2, outputs=4)
  rates = [0.01, 0.1]
  want = sweep.run(task, optax.sgd, rates, 2, 8, 4)
  course = serial.Course(rates, 2, 8, 0, 4)
  rows, tried = serial.compare(task, lambda rate, _: optax.sgd(rate), course)
  assert not tried and len(rows) == len(want)
  for row in rows:
    names = 'rate', 'seed', 'step'
    (other,) = [w for w in want if all(w[n] == row[n] for n in names)]
    assert row.pop('ms') > 0
    assert row.keys() == other.keys()
    for name in other:
      np.testing.assert_allclose(row[name], other[name], rtol=2e-5)


def test_after_a_trial_one_rate_is_run():
  told = []
  rows, tried = serial.compare(
    quadratic(), falling, COURSE, say=lambda *x: told.append(x)
  )
  assert [(r['rate'], r['seed'], r['step']) for r in tried] == [
    (rate, 0, step) for rate in COURSE.rates for step in (2, 4)
  ]
  assert [(r['rate'], r['seed'], r['step']) for r in rows] == [
    (0.4, seed, step) for seed in (0, 1) for step in (2, 4, 6)
  ]
  for row in (*tried[1::2], *rows[2::3]):
    loss = by_hand(row['rate'], row['seed'], row['step'])
    assert row['loss'] == pytest.approx(loss, rel=1e-2)
  assert told[0] == (2, 24) and told[-1] == (24, 24)
  assert [done for done, _ in told] == sorted(done for done, _ in told)
  assert serial.step_ms(rows[:3]) == (rows[1]['ms'] + rows[2]['ms']) / 2
  assert serial.step_ms(rows[:1]) is None
  ended, _ = serial.compare(
    quadratic(), falling, COURSE, enough=lambda run: run[-1]['step'] == 2
  )
  assert [r['step'] for r in ended] == [2, 2]


def test_the_first_steps_have_batches_of_their_own():
  task = quadratic()._replace(
    loss=lambda w, batch: ((w - batch) ** 2).mean(),
    early=(
      lambda data, seed, step: jnp.stack([data - 1, data - 3]) + seed,
      lambda data, seed, step: data + jnp.zeros(3),
    ),
    share=0.6,
  )

  def make(rate, steps=6):
    return falling(rate, steps)

  course = serial.Course((0.1, 0.2), seeds=2, steps=6, trial=0, every=2)
  one_by_one, _ = serial.compare(task, make, course)
  together = sweep.run(task, make, (0.1, 0.2), 2, 6, 2)
  for row in (*one_by_one, *together):
    seed, w = row['seed'], 0.5 * row['seed']
    for step in range(row['step']):
      late = 3.0 if step < 4 else 3.0 + 0.01 * step
      aim = 1.0 + seed if step < 2 else late
      w -= row['rate'] * (1.0 - step / 6) * 2 * (w - aim)
    assert row['loss'] == pytest.approx((w - 3.0) ** 2, rel=1e-4)
  assert len(one_by_one) == len(together) == 12
  # a trial has its own first steps; whole stretches, and none if there are none
  assert task.plan(10, 1) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
  assert task._replace(early=()).plan(6, 2) == [0, 0, 0]
  for steps, every in ((4, 2), (6, 6)):  # one length of rows too many
    with pytest.raises(ValueError, match='give more evaluations'):
      task.plan(steps, every)


def test_what_is_done_is_kept_and_not_done_again(tmp_path, monkeypatch):
  kept = serial.Kept(tmp_path / 'runs', {'task': 'quadratic'})
  seen = []
  train = serial.run

  def watched(*args):
    seen.append(args[2:5])
    if len(seen) == 5:
      raise KeyboardInterrupt
    return train(*args)

  monkeypatch.setattr(serial, 'run', watched)
  with pytest.raises(KeyboardInterrupt):
    serial.compare(quadratic(), falling, COURSE, kept)
  found = serial.compare(quadratic(), falling, COURSE, kept)
  done = [(0.1, 0, 4), (1e-4, 0, 4), (0.4, 0, 4), (0.4, 0, 6), (0.4, 1, 6)]
  assert seen == [*done, (0.4, 1, 6)]
  monkeypatch.setattr(serial, 'programs', None)  # nothing is left to compile
  assert serial.compare(quadratic(), falling, COURSE, kept) == found
  # of more seeds these are the first, of other rates the trials that there are
  fewer = COURSE._replace(rates=(0.4,), seeds=1)
  rows, tried = serial.compare(quadratic(), falling, fewer, kept)
  assert (rows, tried) == (found[0][:3], found[1][4:])
  with pytest.raises(cells.CellError, match='Give another workdir'):
    other = kept._replace(key={'task': 'another'})
    serial.compare(quadratic(), falling, COURSE, other)


def test_programs_are_compiled_once(monkeypatch):
  many = []
  compiled = serial.programs

  def counted(*args):
    many.append(compiled(*args))
    return many[-1]

  monkeypatch.setattr(serial, 'programs', counted)
  serial.compare(quadratic(), falling, COURSE)
  assert len(many) == 1
