"""Delta gradient descent is the exact proximal step of NL Eq. 56."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestax.optim import dgd

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(6, 4)).astype(np.float32)


def objective(new, kernel, x, grad_y, eta):
  """Eq. 56 in NL's letters, W = kernel^T, u = -dL/dy."""
  fit = jnp.sum((new.T @ x + grad_y) ** 2) / 2
  return fit + jnp.sum((new - kernel) ** 2) / (2 * eta)


@pytest.mark.parametrize('eta', [0.01, 1.0, 100.0])
def test_one_sample_minimises_the_objective(eta):
  x, grad_y = RNG.normal(size=6), RNG.normal(size=4)
  new = dgd.step(KERNEL, x, grad_y, eta)
  slope = jax.grad(objective)(new, KERNEL, x, grad_y, eta)
  np.testing.assert_allclose(slope, 0, atol=1e-3)


def test_a_unit_input_gives_the_printed_rate():
  x, grad_y, eta = np.eye(6)[2], RNG.normal(size=4), 0.7
  rate = eta / (1 + eta)
  w = KERNEL.T  # NL's W is [out, in]
  want = w @ (np.eye(6) - rate * np.outer(x, x)) - rate * np.outer(grad_y, x)
  got = dgd.step(KERNEL, x, grad_y, eta)
  np.testing.assert_allclose(got, want.T, atol=1e-6)


@pytest.mark.parametrize('batch', [1, 3, 20])
def test_a_batch_minimises_its_mean_objective(batch):
  x = RNG.normal(size=(batch, 6)).astype(np.float32)
  grad_y = RNG.normal(size=(batch, 4)).astype(np.float32)
  eta = 0.8
  new = dgd.proximal(KERNEL, x.T @ grad_y / batch, x, eta)

  def mean_objective(new):
    fit = jnp.mean(jnp.sum((x @ new + grad_y) ** 2, -1)) / 2
    return fit + jnp.sum((new - KERNEL) ** 2) / (2 * eta)

  np.testing.assert_allclose(jax.grad(mean_objective)(new), 0, atol=1e-4)
  if batch == 1:
    one = dgd.step(KERNEL, x[0], grad_y[0], eta)
    np.testing.assert_allclose(new, one, atol=1e-5)


def test_the_transformation_takes_the_step_where_it_has_inputs():
  params = {'dense': {'kernel': jnp.asarray(KERNEL), 'bias': jnp.ones(4)}}
  grads = jax.tree.map(jnp.ones_like, params)
  x = jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32)
  tx = dgd.dgd(optax.linear_schedule(0.5, 0.0, 2))
  state = tx.init(params)
  inputs = {'dense': {'kernel': x, 'bias': None}}
  for eta in (0.5, 0.25):
    updates, state = jax.jit(tx.update)(grads, state, params, inputs=inputs)
    want = dgd.proximal(
      params['dense']['kernel'], grads['dense']['kernel'], x, eta
    )
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params['dense']['kernel'], want, atol=1e-5)
  np.testing.assert_allclose(params['dense']['bias'], 1 - 0.75, atol=1e-6)


def test_it_works_beside_another_optimiser():
  params = {'a': jnp.asarray(KERNEL), 'b': jnp.ones((3, 3))}
  inputs = {'a': jnp.ones((2, 6)), 'b': jnp.ones((2, 3))}
  tx = optax.multi_transform(
    {'dgd': dgd.dgd(0.1), 'sgd': optax.sgd(0.1)}, {'a': 'dgd', 'b': 'sgd'}
  )
  updates, _ = tx.update(params, tx.init(params), params, inputs=inputs)
  want = dgd.proximal(KERNEL, KERNEL, np.ones((2, 6)), 0.1) - KERNEL
  np.testing.assert_allclose(updates['a'], want, atol=1e-5)
  np.testing.assert_allclose(updates['b'], -0.1, atol=1e-6)


@pytest.mark.parametrize('rate', [float('nan'), -1.0, 'fast'])
def test_rates_out_of_range_are_refused(rate):
  with pytest.raises(dgd.DgdError, match=f'learning_rate is {rate!r}'):
    dgd.dgd(rate)


def test_an_update_without_parameters_is_refused():
  tx = dgd.dgd(0.1)
  with pytest.raises(dgd.DgdError, match='needs the parameters'):
    tx.update({'a': jnp.ones(2)}, tx.init(None))


def test_inputs_that_do_not_fit_are_refused():
  params = {'a': jnp.ones((6, 4))}
  tx = dgd.dgd(0.1)
  with pytest.raises(dgd.DgdError, match=r'a has the shape \(6, 4\)'):
    tx.update(params, tx.init(params), params, inputs={'a': jnp.ones((2, 5))})


def test_an_update_without_inputs_or_with_none_in_a_batch_is_refused():
  params = {'a': jnp.ones((6, 4))}
  tx = dgd.dgd(0.1)
  with pytest.raises(dgd.DgdError, match='needs `inputs`'):
    tx.update(params, tx.init(params), params)
  with pytest.raises(dgd.DgdError, match='B 1 or more'):
    tx.update(params, tx.init(params), params, inputs={'a': jnp.ones((0, 6))})
  updates, _ = tx.update(params, tx.init(params), params, inputs={})
  np.testing.assert_allclose(updates['a'], -0.1)
