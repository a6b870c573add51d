"""The continual problem: orthogonal tasks, losses in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.launch.evals import orthogonal

TASK = orthogonal.task(2, 80, tasks=4, rank=3, outputs=5)


def test_inputs_of_different_tasks_are_orthogonal():
  x = [TASK.batch(TASK.data, 1, step)[0] for step in (0, 19, 20, 79)]
  assert np.abs(x[0] @ x[1].T).max() > 1e-2  # the same task
  for later in x[2:]:
    assert np.abs(x[0] @ later.T).max() < 1e-5


def test_losses_are_one_at_first_and_zero_at_the_solution():
  first = TASK.evaluate(TASK.data, TASK.init(TASK.data, 0), 0, 80)
  # the target is random: 1 in the mean over many
  assert 0.5 < first['loss, tasks seen'] < 1.5
  solved = {'kernel': TASK.data['target'][0]}
  found = TASK.evaluate(TASK.data, solved, 0, 80)
  assert all(abs(value) < 1e-9 for value in found.values())


def test_the_closed_form_is_the_mean_over_samples():
  params = {'kernel': jnp.ones((12, 5))}
  batches = jax.vmap(lambda step: TASK.batch(TASK.data, 0, step % 20))
  x_NxI = batches(jnp.arange(20))[0].reshape(-1, 12)
  y_NxO = x_NxI @ TASK.data['target'][0]
  sampled = np.mean((x_NxI @ params['kernel'] - y_NxO) ** 2)
  known = TASK.evaluate(TASK.data, params, 0, 20)['loss, task at hand']
  assert abs(sampled / known - 1) < 0.25


def test_gradient_descent_leaves_earlier_tasks_as_they_were():
  params = {'kernel': jnp.zeros((12, 5))}
  earlier = []

  @jax.jit
  def descended(params, step):
    grads = jax.grad(TASK.loss)(params, TASK.batch(TASK.data, 0, step))
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

  for step in range(40):
    params = descended(params, step)
    if step in (19, 39):
      earlier.append(TASK.evaluate(TASK.data, params, 0, 40))
  name = 'loss, earlier tasks'
  np.testing.assert_allclose(earlier[0][name], earlier[1][name], rtol=1e-4)


def test_steps_that_do_not_make_equal_tasks_are_refused():
  with pytest.raises(ValueError, match='10 steps do not make 4 tasks'):
    orthogonal.task(1, 10, tasks=4)
