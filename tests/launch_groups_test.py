"""Groups of parameters: what is frozen, and what is updated how often."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from nestax.launch import groups, optimizer
from nestax.models import language_model
from nestax.models.config import ModelConfig
from nestax.optim import labels


def make_config(**opt):
  return ml_collections.ConfigDict(
    {
      'optimizer': opt.pop('optimizer', 'm3'),
      'opt': optimizer.default_opt() | {'warmup': 2, 'every': 2} | opt,
      'train': {'steps': 20},
    }
  )


def shapes(**cms):
  values = {'family': 'hope_attention', 'V': 24, 'D': 8, 'N': 2, 'H': 2}
  values |= {'F': 16, 'cms': {'periods': (4, 8), 'multiple': 4, **cms}}
  return nn.unbox(language_model.abstract_params(ModelConfig.from_dict(values)))


def arrays(tree, seed):
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return structure.unflatten(
    [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  )


def run(config, params, steps):
  """Parameters before the first step and after each, by path."""
  tx, _ = optimizer.build(config, params)
  update = jax.jit(tx.update)
  state, seen = tx.init(params), [params]
  for step in range(steps):
    updates, state = update(arrays(params, 1 + step), state, params)
    params = jax.tree.map(jnp.add, params, updates)
    seen.append(params)
  return [dict(zip(labels.paths(p), jax.tree.leaves(p))) for p in seen]


@pytest.mark.parametrize('name', ['adamw', 'm3'])
def test_what_is_frozen_keeps_every_bit_and_the_rest_moves(name):
  config = make_config(optimizer=name, freeze='embed/.*|blocks/level_1/.*')
  params = arrays(shapes(slots=1, rank=2), 0)
  before, after = run(config, params, 1)
  for path in before:
    still = path.startswith(('embed/', 'blocks/level_1/')) or 'slots' in path
    assert np.array_equal(before[path], after[path]) == still, path
  frozen = groups.frozen(config, params)
  for path, no in zip(labels.paths(params), jax.tree.leaves(frozen)):
    assert no == np.array_equal(before[path], after[path]), path


def test_what_cannot_be_frozen_is_refused_in_words():
  everything = 'nothing is left to train'
  with pytest.raises(groups.OptimizerError, match=everything):
    config = make_config(freeze='(?!.*slots).*')
    groups.frozen(config, shapes(slots=1, rank=2))
  for words, said in (
    ('level_9', r"'level_9': it matches none of blocks/"),
    ('.*', everything),
    ('(', 'opt.freeze is'),
  ):
    with pytest.raises(groups.OptimizerError, match=said):
      groups.frozen(make_config(freeze=words), shapes())


@pytest.mark.parametrize('name', ['adamw', 'm3'])
def test_a_slower_level_moves_when_it_is_due(name):
  config = make_config(optimizer=name, level_every=(1, 3))
  seen = run(config, arrays(shapes(), 0), 6)
  for step, (before, after) in enumerate(zip(seen, seen[1:]), start=1):
    for path in before:
      due = not path.startswith('blocks/level_1/') or step % 3 == 0
      # the first learning rate of the warm-up is small, but not zero
      assert np.array_equal(before[path], after[path]) != due, (step, path)


def test_the_learning_rate_goes_by_steps_whatever_the_frequency():
  flat = {'clip': 0.0, 'weight_decay': 0.0, 'optimizer': 'adamw', 'eps': 1e-30}
  config = make_config(level_every=(1, 5), **flat)
  tx, schedule = optimizer.build(config, params := arrays(shapes(), 0))
  state, ones = tx.init(params), jax.tree.map(jnp.ones_like, params)
  update = jax.jit(tx.update)
  for _ in range(15):
    updates, state = update(ones, state, params)
  # of equal gradients Adam's steps are as long as the learning rate
  for level in ('level_0', 'level_1'):
    got = updates['blocks'][level]['up']
    np.testing.assert_allclose(got, -schedule(14), rtol=1e-3)


def test_wrong_frequencies_are_refused_in_words():
  for wrong in ((1, 2, 3), (0,), (1.5,)):
    with pytest.raises(groups.OptimizerError, match='at most 2 whole numbers'):
      groups.choose(make_config(level_every=wrong), shapes())
