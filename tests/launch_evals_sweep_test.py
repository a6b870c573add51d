"""Many runs side by side are the runs one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestax.launch.evals import contenders, orthogonal, sweep
from nestax.optim import m3

TASK = orthogonal.task(2, 8, tasks=2, rank=2, outputs=4)


def make_m3(rate):
  slow = (m3.TimeScale(every=3),)
  return m3.m3(rate, slow=slow, dtype='float32')


def alone(make, rate, seed, steps):
  params = TASK.init(TASK.data, seed)
  tx = optax.with_extra_args_support(make(rate))
  state = tx.init(params)
  for step in range(steps):
    batch = TASK.batch(TASK.data, seed, step)
    grads = jax.grad(TASK.loss)(params, batch)
    inputs = TASK.inputs(batch)
    updates, state = tx.update(grads, state, params, inputs=inputs)
    params = optax.apply_updates(params, updates)
  return TASK.evaluate(TASK.data, params, seed, steps)


@pytest.mark.parametrize('name', ['m3', 'dgd'])
def test_each_run_of_a_grid_is_that_run_alone(name):
  shapes = jax.eval_shape(TASK.init, TASK.data, 0)
  make = make_m3
  if name == 'dgd':
    schedule = lambda _: 1.0  # noqa: E731
    make = contenders.make('dgd', shapes, orthogonal.RULES, schedule, 0.0)
  rows = sweep.run(TASK, make, [0.01, 0.1], 2, 8, 4)
  assert len(rows) == 2 * 2 * 2
  for row in [row for row in rows if row['step'] == 8]:
    want = alone(make, row['rate'], row['seed'], 8)
    for key, value in want.items():
      np.testing.assert_allclose(row[key], value, rtol=2e-4, err_msg=key)


def test_the_refresh_of_m3_stays_a_conditional_in_a_grid():
  # with a count of its own for each run it would be a selection
  def start(data, seed):
    params = TASK.init(data, seed)
    return params, make_m3(0.1).init(params)

  layout = sweep._layout(start, TASK.data, jnp.int32(0))
  assert layout[1][0].count is None
  assert layout[1][0].fast == {'kernel': 0}


def test_what_is_not_finite_is_none_and_the_others_go_on():
  rows = sweep.run(TASK, optax.sgd, [0.01, 1e30], 1, 8, 8)
  good, bad = rows
  assert good['train'] > 0 and bad['train'] is None


def test_a_step_takes_time():
  assert 0 < sweep.seconds_per_step(TASK, make_m3, 0.1, 4, 1) < 1


def test_steps_that_evaluations_do_not_divide_are_refused():
  with pytest.raises(ValueError, match='8 steps are no multiple of 3'):
    sweep.run(TASK, optax.sgd, [0.1], 1, 8, 3)
