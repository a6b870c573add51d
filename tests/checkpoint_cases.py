"""What the tests of checkpoints share: a state, data, a workdir of three."""

import os
import pathlib
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from nestax.launch import checkpoint


class State(NamedTuple):
  """Has all that a TrainState has: keys, optax states, None, bfloat16."""

  step: Any
  params: Any
  opt_state: Any
  memory: Any
  key: Any


def make_state(seed: int) -> State:
  key = jax.random.key(seed)
  params = {
    'kernel': jax.random.normal(key, (64, 128)),
    'scale': jnp.full((8,), seed, jnp.bfloat16),
  }
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  return State(jnp.asarray(seed), params, tx.init(params), None, key)


def make_data():
  data = grain.MapDataset.range(100).shuffle(seed=1).repeat().batch(2)
  return iter(data.to_iter_dataset())


def make_config(**train):
  return ml_collections.ConfigDict(
    {
      'model': {'D': 8, 'remat': 'none'},
      'train': {'steps': 10, 'batch': 2} | train,
      'checkpoint': {'keep': 3, 'every': 1, 'keep_every': 0, 'keep_best': 0},
    }
  )


def write(workdir, said):
  """Writes checkpoints 1, 2, 3; gives the data that follows 2 and 3, too."""
  data, following = make_data(), {}
  checkpoints = checkpoint.Checkpoints(workdir, make_config(), said.append)
  for step in (1, 2, 3):
    following[step - 1] = next(data)
    checkpoints.save(step, make_state(step), data)
  checkpoints.wait()
  checkpoints.close()
  following[3] = next(data)
  return workdir, following


def open_again(workdir, said, config=None):
  return checkpoint.Checkpoints(workdir, config or make_config(), said.append)


def restore(workdir, said, config=None):
  data = make_data()
  checkpoints = open_again(workdir, said, config)
  abstract = jax.eval_shape(lambda: make_state(0))
  whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), abstract
  )
  state = checkpoints.restore(abstract, data)
  checkpoints.close()
  return state, data


def assert_same(got, want):
  def one(a, b):
    assert a.dtype == b.dtype
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)

  jax.tree.map(one, got, want)


def largest(folder: pathlib.Path) -> pathlib.Path:
  return max(folder.rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)


def truncate(folder):
  path = largest(folder)
  os.truncate(path, path.stat().st_size // 2)
