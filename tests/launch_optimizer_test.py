"""The optimiser that a config names: what it decays, clips and refuses."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from nestax.launch import optimizer

PARAMS = {
  'blocks': {
    'mixer': {'query': {'kernel': jnp.ones((2, 8, 2, 4))}},
    'norm': {'scale': jnp.ones((2, 8))},
  },
  'embed': {'embedding': jnp.ones((16, 8))},
}


def make_config(name, **opt):
  return ml_collections.ConfigDict(
    {
      'optimizer': name,
      'opt': optimizer.default_opt() | {'warmup': 2} | opt,
      'train': {'steps': 20},
    }
  )


def test_zero_gradient_decays_only_matrices():
  tx, schedule = optimizer.build(make_config('adamw'), PARAMS)
  updates, _ = tx.update(
    jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS
  )
  kernel = updates['blocks']['mixer']['query']['kernel']
  np.testing.assert_allclose(kernel, -0.1 * schedule(0), rtol=1e-6)
  assert not jnp.any(updates['blocks']['norm']['scale'])
  assert not jnp.any(updates['embed']['embedding'])


def test_large_gradients_are_clipped_to_the_norm():
  config = make_config('adamw', clip=0.5, b1=0.0)
  tx, _ = optimizer.build(config, PARAMS)
  grads = jax.tree.map(lambda x: 1e3 * jnp.ones_like(x), PARAMS)
  _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
  mu = optax.tree.get(state, 'mu')
  np.testing.assert_allclose(optax.global_norm(mu), 0.5, rtol=1e-5)


def test_unknown_optimizer_is_refused_with_the_names():
  with pytest.raises(optimizer.OptimizerError, match="'sgd'.*adamw"):
    optimizer.build(make_config('sgd'), PARAMS)


@pytest.mark.parametrize('name', ['clip', 'weight_decay'])
def test_negative_numbers_are_refused(name):
  with pytest.raises(optimizer.OptimizerError, match=f'opt.{name} is -1.0'):
    optimizer.build(make_config('adamw', **{name: -1.0}), PARAMS)
