"""Expert slots in a level: no change at birth, read by all, frozen outside."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import sleep_cases as cases

from nestax.cms import experts
from nestax.launch import optimizer
from nestax.models import axes, language_model, model_state
from nestax.models import block as blocks
from nestax.models.config import ModelConfig
from nestax.optim import labels


def logits(cfg, params, learning):
  tokens = cases.tokens(2, 12)
  state = model_state.init_state(cfg, 2, 16) if learning else None
  return cases.applied(cfg)({'params': params}, state, tokens)[1]


def with_slot(params, level, change):
  own = params['blocks'][level]
  slots = change(experts.Slots(*(own['slots'][n] for n in SLOTS)))
  own = own | {'slots': dict(zip(SLOTS, slots))}
  return params | {'blocks': params['blocks'] | {level: own}}


SLOTS = ('a', 'b', 'logit', 'active')


def test_without_slots_there_are_no_parameters_for_them():
  paths = labels.paths(language_model.abstract_params(cases.config()))
  assert not [path for path in paths if 'slots' in path]


@pytest.mark.parametrize('learning', [False, True])
@pytest.mark.parametrize('blocks', ['none', 'all'])
def test_growth_keeps_every_bit_and_what_a_slot_holds_is_read(learning, blocks):
  cfg = cases.config(slots=2, rank=3, blocks=blocks)
  params = cases.params_of(cfg)
  before = logits(cfg, params, learning)
  grown = with_slot(params, 'level_1', lambda s: experts.activate(s, 1))
  np.testing.assert_array_equal(logits(cfg, grown, learning), before)
  filled = with_slot(
    grown, 'level_1', lambda s: s._replace(b_SxRxD=s.b_SxRxD + 0.1)
  )
  assert np.abs(logits(cfg, filled, learning) - before).max() > 1e-3


@pytest.mark.parametrize('name', optimizer.NAMES)
def test_training_leaves_slots_alone(name):
  cfg = cases.config(slots=2, rank=3)
  params = cases.params_of(cfg)
  config = ml_collections.ConfigDict(
    {
      'optimizer': name,
      'opt': optimizer.default_opt() | {'warmup': 0},
      'train': {'steps': 4},
    }
  )
  tx, _ = optimizer.build(config, params)

  @jax.jit
  def trained(params):
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    return optax.apply_updates(params, updates)

  after = trained(params)
  for path, old, new in zip(
    labels.paths(params), jax.tree.leaves(params), jax.tree.leaves(after)
  ):
    assert ('slots' in path) == np.array_equal(old, new), path


def test_slots_are_laid_on_the_mesh_as_other_parameters():
  mesh = jax.make_mesh(
    (2,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  boxed = language_model.abstract_params(cases.config(slots=2, rank=3))
  layout = axes.shardings(mesh, boxed)['blocks']['level_0']['slots']
  assert layout['a'].spec == jax.P(None, None, 'fsdp', None)
  shapes = nn.unbox(boxed)['blocks']['level_0']['slots']
  assert shapes['a'].shape == (2, 2, 8, 3)


def test_a_rank_above_the_width_is_refused():
  with pytest.raises(ValueError, match='cms.rank=40 .* D=16'):
    ModelConfig.from_dict({'D': 16, 'cms': {'slots': 1, 'rank': 40}})


@pytest.mark.parametrize('shape', [(2, 5, 7), (5, 8), (1, 2, 5, 8)])
def test_a_block_refuses_what_is_not_of_its_width(shape):
  block = blocks.Block(cases.config())
  key, x = jax.random.key(0), jnp.zeros(shape)
  words = re.escape(f'a block reads [B, L, D=8], not an array of {shape}')
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(block.init, key, None, x)


def test_a_block_is_a_layer_of_a_network_of_ones_own():
  class Own(nn.Module):
    @nn.compact
    def __call__(self, state, x_BxLx3):
      x_BxLxD = nn.Dense(8)(x_BxLx3)
      state, x_BxLxD, _ = blocks.Block(cases.config('hope'))(state, x_BxLxD)
      return state, nn.Dense(1)(x_BxLxD)

  x = jax.random.normal(jax.random.key(0), (2, 9, 3))
  params = jax.jit(Own().init)(jax.random.key(1), None, x)
  read = jax.jit(functools.partial(Own().apply, nn.unbox(params)))
  _, whole = read(None, x)
  state, first = read(blocks.init_state(cases.config('hope'), 2, 0), x[:, :4])
  _, rest = read(state, x[:, 4:])
  got = jnp.concatenate([first, rest], 1)
  np.testing.assert_allclose(got, whole, atol=1e-5)
