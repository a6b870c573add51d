"""A GPU's kernels for a two-layer `mem` alone, interpreted, and the token rule.

Those of Titans and TTT-MLP, whose gates are handed in.
"""

import functools

import deep_cases
import jax
import jax.numpy as jnp
import memory_cases as cases
import pytest
from deep_cases import LENGTH, C

from nestax.models import block
from nestax.models.families import FAMILY
from nestax.models.memory import (
  gpu_alone,
  gpu_alone_turn,
  gpu_deep,
  pallas_gpu,
)
from nestax.models.memory.types import MemoryConfig, init_state


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """The smallest head; four slices, two for the kernel that takes more."""
  monkeypatch.setattr(cases, 'K', 16)
  monkeypatch.setattr(gpu_deep, 'SLICE', 16)
  monkeypatch.setattr(gpu_alone_turn, 'BROAD', 32)


def rule(family, **options):
  options = FAMILY[family].rule | {'depth_mem': 2, 'expansion': 4} | options
  return MemoryConfig(chunk_mem=C, chunk_rest=C, **options)


def first_values(cfg):
  """So large that some tokens' steps are divided by their gains, some not."""
  inner, outer = (8.0, 3.0) if cfg.bounded else (1.0, 1.0)
  initial = cases.initial_values(cfg, jnp.float32)
  initial = {name: x for name, x in initial.items() if name not in cfg.given}
  mem = initial['mem']
  mem = {'inner': inner * mem['inner'], 'outer': outer * mem['outer']}
  return initial | {'mem': mem}


def begun(cfg):
  """State that streams go on from, at a boundary."""
  state = init_state(cfg, cases.B, cases.H, cases.K)
  leaves, tree = jax.tree.flatten((state.running, state.momentum))
  keys = jax.random.split(jax.random.key(3), len(leaves))
  leaves = [
    0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves)
  ]
  running, momentum = jax.tree.unflatten(tree, leaves)
  return state._replace(boundary=running, running=running, momentum=momentum)


def check(cfg, stream, dtype, tolerance, length=LENGTH):
  initial = first_values(cfg)
  inputs = cases.inputs(cfg, jnp.float32, length, resets=stream)
  if cfg.momentum:  # that lasts from chunk to chunk
    inputs = inputs._replace(log_beta=0.1 * inputs.log_beta)
  state = begun(cfg) if stream else None
  deep_cases.check(cfg, initial, state, inputs, dtype, tolerance)


def test_titans_equals_the_token_rule_in_a_stream_of_documents():
  check(rule('titans'), True, 'float32', 5e-5)


def test_ttt_equals_the_token_rule():
  check(rule('ttt_mlp'), False, 'float32', 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'family,stream,options,length',
  [
    ('titans', False, {}, LENGTH),
    ('titans', True, {}, 2 * C),
    ('titans', True, {}, C - 7),
    ('titans', True, {'read': 'boundary'}, LENGTH),
    ('titans', True, {'bounded': False}, LENGTH),
    ('titans', True, {'identity': ('mem',), 'given': ()}, LENGTH),
    ('titans', True, {'momentum': False, 'value_norm': True}, LENGTH),
    ('ttt_mlp', True, {}, LENGTH),
  ],
)
def test_rules_like_them_equal_the_token_rule(family, stream, options, length):
  check(rule(family, **options), stream, 'float32', 5e-5, length)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['titans', 'ttt_mlp'])
def test_in_bfloat16_they_equal_the_token_rule(family):
  check(rule(family), True, 'bfloat16', 6e-2, 2 * C)


def test_kernels_lower_for_cuda_without_a_gpu():
  cfg = rule('titans')
  inputs = cases.inputs(cfg, jnp.float32)

  def loss(initial, query):
    here = inputs._replace(query=query)
    end, out = pallas_gpu.run(
      cfg, initial, begun(cfg), here, 'bfloat16', aligned=True
    )
    return jnp.sum(out) + jnp.sum(end.boundary.stack)

  device = jax.sharding.AbstractDevice('NVIDIA H100', 132, 'gpu')
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((1,), ('x',), auto, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(
      first_values(cfg), inputs.query
    )
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  names = ('walk', 'over', 'errors', 'turn', 'back')
  assert [name for name in names if f'memory_alone_{name}' not in text] == []


@pytest.mark.parametrize(
  'options',
  [
    {'adaptive': ('k',)},
    {'adaptive': ('eta',), 'given': ('alpha',), 'generated': True},
    {'delta': True},
    {'objective': 'dot'},
    {'depth_mem': 1},
  ],
)
def test_other_rules_are_not_theirs(options):
  assert gpu_alone.covers(rule('titans'))
  assert not gpu_alone.covers(rule('titans', **options))


def test_kernels_are_taken_on_the_gpus_that_they_were_tried_on(monkeypatch):
  cfg = rule('titans')
  monkeypatch.setattr(pallas_gpu, 'capability', lambda: '9.0')
  pallas_gpu.check(cfg, C, 16, 'bfloat16')
  pallas_gpu.check_tried(cfg, 1)
  monkeypatch.setattr(pallas_gpu, 'capability', lambda: '8.0')
  with pytest.raises(pallas_gpu.DoesNotFit, match="capability '8.0'"):
    pallas_gpu.check_tried(cfg, 1)


def test_what_chunks_begin_with_is_not_kept_where_kernels_results_are():
  cfg = rule('titans')
  inputs = cases.inputs(cfg, jnp.float32)

  def kept(policy):
    @functools.partial(jax.checkpoint, policy=block.POLICIES[policy])
    def run(initial, query):
      here = inputs._replace(query=query)
      return pallas_gpu.run(cfg, initial, None, here, 'bfloat16')[1]

    args = first_values(cfg), inputs.query
    back = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], *args)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(back))

  assert kept('kernels') == kept('dots')
