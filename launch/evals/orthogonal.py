"""Regressions on orthogonal inputs, one after another (NL section 4.3).

The tasks share one solution W* and their gradients lie in orthogonal spaces,
so that nothing about a task has to be lost when the next one begins.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch.evals.sweep import Task

RULES = (('kernel', 'matrix'),)
NOISE = 0.1  # of the targets
BATCH = 16


def task(
  seeds: int,
  steps: int,
  tasks: int = 8,
  rank: int = 8,
  outputs: int = 32,
) -> Task:
  """Draws a stream of `tasks` regressions y = W*^T x for each seed.

  Task i has inputs x = U_i z, z ~ N(0, I), the U_i blocks `[width, rank]` of
  an orthogonal basis. Losses are the expected ones without the noise of the
  targets, in closed form, 1 for W = 0.

  Args:
    seeds: streams.
    steps: of a whole stream; tasks last equally long.
    tasks: in a stream.
    rank: inputs' dimensions of each task; their width is `tasks * rank`.
    outputs: of the regression.

  Raises:
    ValueError: if `tasks` does not divide `steps`.
  """
  if steps % tasks:
    raise ValueError(f'{steps} steps do not make {tasks} tasks of equal length')
  width, each = tasks * rank, steps // tasks
  rng = np.random.default_rng(0)
  bases = [
    np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(seeds)
  ]
  data = {
    'bases': jnp.array(
      [b.reshape(width, tasks, rank).swapaxes(0, 1) for b in bases], jnp.float32
    ),
    'target': jnp.array(
      rng.normal(size=(seeds, width, outputs)) / rank**0.5, jnp.float32
    ),
  }

  def init(data, seed):
    return {'kernel': jnp.zeros_like(data['target'][seed])}

  def batch(data, seed, step):
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.random.split(key)
    z_BxR = jax.random.normal(keys[0], (BATCH, rank))
    x_BxI = z_BxR @ data['bases'][seed, step // each].T
    y_BxO = x_BxI @ data['target'][seed]
    return x_BxI, y_BxO + NOISE * jax.random.normal(keys[1], y_BxO.shape)

  def loss(params, batch):
    x_BxI, y_BxO = batch
    error_BxO = x_BxI @ params['kernel'] - y_BxO
    return 0.5 * jnp.mean(jnp.sum(error_BxO**2, axis=-1))

  def evaluate(data, params, seed, step):
    error = params['kernel'] - data['target'][seed]
    losses_T = jnp.sum((data['bases'][seed].mT @ error) ** 2, axis=(1, 2))
    losses_T = losses_T / outputs
    now = (step - 1) // each
    index = jnp.arange(tasks)

    def mean(chosen):
      return jnp.sum(losses_T * chosen) / jnp.maximum(jnp.sum(chosen), 1)

    return {
      'loss, tasks seen': mean(index <= now),
      'loss, earlier tasks': mean(index < now),
      'loss, task at hand': mean(index == now),
    }

  def inputs(batch):
    return {'kernel': batch[0]}

  return Task(data, init, batch, loss, evaluate, 'loss, tasks seen', inputs)
