"""The optimiser that a config names: whom it updates, decays, and refuses."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from nestax.launch import groups, optimizer
from nestax.launch import mesh as meshes
from nestax.models import axes, language_model
from nestax.models.config import FAMILIES, ModelConfig
from nestax.models.families import WINDOWED
from nestax.models.memory.types import MemoryConfig
from nestax.optim import coefficients, labels, m3, matrices

PARAMS = {
  'blocks': {
    'mixer': {
      'query': {'kernel': jnp.ones((2, 8, 2, 4))},
      'query_conv': {'kernel': jnp.ones((2, 4, 2, 4))},
      'out': {'kernel': jnp.ones((2, 2, 4, 8))},
    },
    'level_0': {
      'up': jnp.ones((2, 8, 24)),
      'norm': {'scale': jnp.ones((2, 8))},
    },
  },
  'embed': {'embedding': jnp.ones((16, 8))},
}
MATRIX_PATHS = {
  'blocks/mixer/query/kernel',
  'blocks/mixer/out/kernel',
  'blocks/level_0/up',
}


def make_config(name, **opt):
  return ml_collections.ConfigDict(
    {
      'optimizer': name,
      'opt': optimizer.default_opt() | {'warmup': 2} | opt,
      'train': {'steps': 20},
    }
  )


@jax.jit
def draw(seed):
  keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(PARAMS)))
  keys = jax.tree.structure(PARAMS).unflatten(keys)
  return jax.tree.map(lambda k, x: jax.random.normal(k, x.shape), keys, PARAMS)


def by_path(tree):
  return dict(zip(labels.paths(tree), jax.tree.leaves(tree)))


@pytest.mark.parametrize('name', optimizer.NAMES)
def test_zero_gradient_decays_matrices_and_nothing_else(name):
  tx, schedule = optimizer.build(make_config(name), PARAMS)
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates = jax.jit(lambda p: tx.update(zeros, tx.init(p), p)[0])(PARAMS)
  for path, update in by_path(updates).items():
    want = -0.1 * schedule(0) if path in MATRIX_PATHS else 0.0
    np.testing.assert_allclose(update, want, atol=1e-8, err_msg=path)


@pytest.mark.parametrize('name', ['muon', 'm3'])
def test_what_is_no_matrix_takes_adamw(name):
  config = make_config(name, clip=0.0)
  tx, _ = optimizer.build(config, PARAMS)
  adamw, _ = optimizer.build(make_config('adamw', clip=0.0), PARAMS)
  states = tx.init(PARAMS), adamw.init(PARAMS)
  got, _ = tx.update(draw(0), states[0], PARAMS)
  want, _ = adamw.update(draw(0), states[1], PARAMS)
  for path, update in by_path(got).items():
    same = np.allclose(update, by_path(want)[path], atol=1e-7)
    assert same == (path not in MATRIX_PATHS), path


def test_muon_is_optax_muon():
  config = make_config('muon', clip=0.0, weight_decay=0.0)
  tx, schedule = optimizer.build(config, PARAMS)
  names = labels.label(PARAMS, groups.RULES)
  muon = optax.contrib.muon(
    schedule,
    adam_b2=config.opt.b2,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=jax.tree.map(groups.MATRICES.get, names),
  )
  states = [t.init(PARAMS) for t in (tx, muon)]
  ours, theirs = (jax.jit(t.update) for t in (tx, muon))
  for seed in range(3):
    a, states[0] = ours(draw(seed), states[0], PARAMS)
    b, states[1] = theirs(draw(seed), states[1], PARAMS)
  for path, want in by_path(b).items():
    if path in MATRIX_PATHS:  # optax's Adam has Nesterov's momentum here
      error = jnp.linalg.norm(by_path(a)[path] - want) / jnp.linalg.norm(want)
      assert error < 5e-2, path


def test_m3_reads_all_of_its_options():
  options = {
    'momentum': 0.8,
    'nesterov': False,
    'ns': 'polar_express',
    'ns_steps': 6,
    'consistent_rms': 0.3,
    'b3': 0.7,
    'every': 2,
    'alpha': 0.9,
    'second_moment': 0.9,
    'slow_dtype': 'bfloat16',
    'clip': 0.0,
  }
  tx, schedule = optimizer.build(make_config('m3', **options), PARAMS)
  up = {'up': PARAMS['blocks']['level_0']['up']}
  same = m3.m3(
    schedule,
    0.8,
    0.9,
    (m3.TimeScale(0.7, 2, 0.9),),
    0.1,
    coefficients=coefficients.polar_express(6),
    consistent_rms=0.3,
    slow_dtype='bfloat16',
  )
  state, same_state = jax.jit(tx.init)(PARAMS), jax.jit(same.init)(up)
  update, same_update = jax.jit(tx.update), jax.jit(same.update)
  for seed in range(4):
    got, state = update(draw(seed), state, PARAMS)
    g = {'up': draw(seed)['blocks']['level_0']['up']}
    want, same_state = same_update(g, same_state, up)
  np.testing.assert_allclose(
    got['blocks']['level_0']['up'], want['up'], rtol=2e-2, atol=1e-5
  )


def test_m3_on_a_mesh_is_m3_on_one_device():
  boxed = abstract_params(family='hope')
  mesh = meshes.make(
    {'data': 2, 'fsdp': 2, 'tensor': 2, 'sequence': 1}, rows=4, length=8
  )
  config = make_config('m3', every=2, ns_steps=2)
  shapes = nn.unbox(boxed)

  def draw_like(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), shapes
    )

  def run(mesh, where, state_where):
    tx, _ = optimizer.build(config, boxed, mesh)
    params = jax.device_put(draw_like(0), where)
    state = jax.jit(tx.init, out_shardings=state_where(tx))(params)
    update = jax.jit(tx.update, out_shardings=(where, state_where(tx)))
    for seed in range(1, 4):
      updates, state = update(
        jax.device_put(draw_like(seed), where), state, params
      )
    return updates

  def like_params(tx):
    state = jax.eval_shape(tx.init, shapes)
    return meshes.like_params(mesh, boxed, state)

  got = run(mesh, axes.shardings(mesh, boxed), like_params)
  want = run(None, None, lambda tx: None)
  for path, update in by_path(got).items():
    # bfloat16 matmuls, summed in another order.
    error = jnp.linalg.norm(np.asarray(update) - by_path(want)[path])
    assert error < 3e-2 * jnp.linalg.norm(by_path(want)[path]) + 1e-8, path


def test_large_gradients_are_clipped_to_the_norm():
  config = make_config('adamw', clip=0.5, b1=0.0)
  tx, _ = optimizer.build(config, PARAMS)
  grads = jax.tree.map(lambda x: 1e3 * jnp.ones_like(x), PARAMS)
  _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
  mu = optax.tree.get(state, 'mu')
  np.testing.assert_allclose(optax.global_norm(mu), 0.5, rtol=1e-5)


@functools.cache
def abstract_params(**fields):
  cfg = ModelConfig(D=16, H=2, F=48, N=3, **fields)
  model = language_model.LanguageModel(cfg)
  tokens_BxL = jnp.zeros((1, 64), jnp.int32)
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), None, tokens_BxL)
  )['params']


FIRST = FAMILIES[:3]
MODELS = [
  *({'family': name, 'tied': tied} for name in FIRST for tied in (0, 1)),
  {'memory': MemoryConfig(depth_mem=2, depth_rest=2)},
  {'memory': MemoryConfig(adaptive=('q', 'k', 'v', 'eta', 'alpha'))},
]


OTHERS = [
  {'family': name, 'window': 8 * (name in WINDOWED)} for name in FAMILIES[3:]
]


@pytest.mark.parametrize(
  'fields,name',
  [*itertools.product(MODELS, optimizer.NAMES), *((f, 'm3') for f in OTHERS)],
  ids=str,
)
def test_every_parameter_of_every_family_has_its_rule(fields, name):
  fields = fields | ({'tied': bool(fields['tied'])} if 'tied' in fields else {})
  boxed = abstract_params(**fields)
  tx, _ = optimizer.build(make_config(name), boxed)
  params = nn.unbox(boxed)
  updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize('fields', MODELS + OTHERS, ids=str)
def test_matrices_lie_as_the_logical_axes_say(fields):
  fields = fields | ({'tied': bool(fields['tied'])} if 'tied' in fields else {})
  boxed = abstract_params(**fields)
  is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
  boxes = jax.tree.leaves(boxed, is_leaf=is_box)
  names = jax.tree.leaves(labels.label(nn.unbox(boxed), groups.RULES))
  width = 16
  for box, name in zip(boxes, names):
    if name in ('level', 'to_heads', 'from_heads'):
      # The width of the model is one whole side of the matrix.
      numbers = groups.MATRICES[name]
      assert width in matrices.sizes(box.value.shape, numbers)
      assert box.names[0] == 'layers'
      side = 'reduction_axis' if name != 'from_heads' else 'output_axis'
      if name != 'level':
        assert box.names[getattr(numbers, side)] == 'embed'


def test_a_parameter_without_a_rule_is_named():
  params = PARAMS | {'blocks': PARAMS['blocks'] | {'new': jnp.ones((2, 3))}}
  with pytest.raises(labels.LabelError, match='no rule matches: blocks/new'):
    optimizer.build(make_config('adamw'), params)


@pytest.mark.parametrize(
  ('name', 'opt', 'words'),
  [
    ('sgd', {}, "optimizer is 'sgd'.*adamw, muon, m3"),
    ('m3', {'ns': 'septic'}, "opt.ns is 'septic'.*quintic"),
    ('m3', {'slow_dtype': 'int8'}, 'opt.slow_dtype'),
    ('m3', {'every': 0}, 'opt.every is 0'),
    ('adamw', {'level_every': (21,)}, 'level 0 would never.* 20 steps'),
    ('m3', {'accumulate': 'mean'}, "accumulate is 'mean'"),
    ('muon', {'accumulate': 'sum', 'momentum': 1.5}, 'momentum is 1.5'),
    ('m3', {'accumulate': 'sum', 'b3': float('inf')}, 'b3 is inf'),
    ('adamw', {'accumulate': 'mean'}, "accumulate is 'mean'"),
    ('m3', {'ns_steps': 0}, 'number of steps is 0'),
    ('m3', {'b3': 1.0}, 'opt.b3 is 1.0'),
    ('adamw', {'b2': -0.1}, 'opt.b2 is -0.1'),
    ('adamw', {'clip': -1.0}, 'opt.clip is -1.0'),
    ('adamw', {'weight_decay': -1.0}, 'opt.weight_decay is -1.0'),
    ('adamw', {'warmup': 20}, '20 steps of 20'),
  ],
)
def test_configs_out_of_range_are_refused(name, opt, words):
  with pytest.raises(ValueError, match=words):
    optimizer.build(make_config(name, **opt), PARAMS)


@pytest.mark.parametrize(
  ('name', 'opt', 'said'),
  [
    ('m3', {'every': 19}, 0),
    ('m3', {'every': 20}, 1),
    ('m3', {'every': 20, 'alpha': 0.0}, 0),
    ('muon', {'every': 20}, 0),
    ('m3', {'every': 4, 'level_every': (5,)}, 1),
    ('m3', {'every': 3, 'level_every': (5,)}, 0),
  ],
)
def test_a_slow_momentum_without_a_say_is_said(name, opt, said, monkeypatch):
  lines = []
  monkeypatch.setattr(
    optimizer.logging, 'warning', lambda words, *x: lines.append(words % x)
  )
  optimizer.build(make_config(name, **opt), PARAMS)
  assert len(lines) == said
  if said:
    few = 4 if 'level_every' in opt else 20
    assert f'there are {few} (train.steps' in lines[0]
