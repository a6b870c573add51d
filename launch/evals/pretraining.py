"""A config's language model as a task of `sweep`, batches laid out ahead."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from nestax.launch import loss
from nestax.launch.data import pipeline
from nestax.launch.evals.sweep import Task
from nestax.models import language_model
from nestax.models.config import ModelConfig


def task(config: ml_collections.ConfigDict, seeds: int) -> Task:
  """Reads all batches of all seeds into memory.

  Args:
    config: as of nestax-train; reads `model`, `data`, `train.steps` and
      `train.batch`. Rows are independent (`train.carry_state` is not read).
    seeds: orders of the data, and first parameters.

  Returns:
    The task; half of the validation batches pick the learning rate ('valid'),
    the other half is 'test', bits a byte both.

  Raises:
    ValueError: in words, for a config that cannot be, or one validation batch.
  """
  cfg = ModelConfig.from_dict(config.model)
  pipeline.check(config, cfg.V)
  model = language_model.LanguageModel(cfg)
  valid = list(pipeline.valid_batches(config))
  if len(valid) < 2:
    raise ValueError(
      f'{len(valid)} batch(es) of validation: it takes 2, to pick a learning '
      'rate by one and report the other; raise data.valid_batches'
    )
  half = len(valid) // 2
  data = {
    'train': _stack([_stack(_read(config, seed)) for seed in range(seeds)]),
    'valid': _stack(valid[:half]),
    'test': _stack(valid[half : 2 * half]),
  }
  data = jax.tree.map(jnp.asarray, data)

  def init(data, seed):
    del data
    tokens_BxL = jnp.zeros((1, 1), jnp.int32)
    return nn.unbox(model.init(jax.random.key(seed), None, tokens_BxL))[
      'params'
    ]

  def batch(data, seed, step):
    return jax.tree.map(lambda x: x[seed, step], data['train'])

  def sums(params, batch):
    _, logits_BxLxV = model.apply(
      {'params': params}, None, batch['tokens'], batch['reset']
    )
    return loss.sums(logits_BxLxV, batch)

  def objective(params, batch):
    return loss.means(sums(params, batch))['loss']

  def bits(params, batches):
    # one batch after another: all runs of a sweep hold theirs at once
    parts = jax.lax.map(functools.partial(sums, params), batches)
    return loss.means(jax.tree.map(jnp.sum, parts))['bits_per_byte']

  def evaluate(data, params, seed, step):
    del seed, step
    return {
      'valid bits/byte': bits(params, data['valid']),
      'test bits/byte': bits(params, data['test']),
    }

  return Task(data, init, batch, objective, evaluate, 'valid bits/byte')


def _read(config, seed):
  config = ml_collections.ConfigDict(config.to_dict())
  config.seed = seed
  batches = pipeline.train_iterator(config)
  return list(itertools.islice(batches, config.train.steps))


def _stack(batches):
  return jax.tree.map(lambda *x: np.stack(x), *batches)
