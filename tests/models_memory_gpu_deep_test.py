"""A GPU's kernels for a two-layer `mem` against the token rule, interpreted."""

import deep_cases
import jax
import jax.numpy as jnp
import memory_cases as cases
import numpy as np
import pytest
from deep_cases import LENGTH, C

from nestax.models.memory import (
  gpu_deep,
  gpu_deep_output,
  gpu_deep_turn,
  pallas_gpu,
)
from nestax.models.memory.gpu_tile import Dots
from nestax.models.memory.types import MemoryConfig, init_state


@pytest.fixture(autouse=True)
def wide_heads(monkeypatch):
  """The kernels' smallest head."""
  monkeypatch.setattr(cases, 'K', 16)
  # four slices, but two for the kernel that takes more
  monkeypatch.setattr(gpu_deep, 'SLICE', 16)
  monkeypatch.setattr(gpu_deep_turn, 'BROAD', 32)
  monkeypatch.setattr(gpu_deep_output, 'BACK', 16)


def rule(**options):
  options = {'depth_mem': 2, 'expansion': 4} | options
  return MemoryConfig(chunk_mem=C, chunk_rest=C, **options)


def first_values(cfg):
  """So large that some tokens' steps are divided by their gains, some not."""
  initial = cases.initial_values(cfg, jnp.float32)
  mem = {'inner': 8.0, 'outer': 3.0}
  initial['mem'] = {x: mem[x] * w for x, w in initial['mem'].items()}
  return initial


def begun(cfg):
  """State that streams go on from, at a boundary."""
  state = init_state(cfg, cases.B, cases.H, cases.K)
  key, _ = jax.random.split(jax.random.key(3), 2)
  running = state.running._replace(
    stack=0.1 * jax.random.normal(key, state.running.stack.shape),
    outer={'mem': jnp.full_like(state.running.outer['mem'], 0.05)},
  )
  return state._replace(boundary=running, running=running)


def check(cfg, stream, dtype, tolerance, resets=True, length=LENGTH):
  initial = first_values(cfg)
  inputs = cases.inputs(cfg, jnp.float32, length, resets=resets)
  state = begun(cfg) if stream else None
  deep_cases.check(cfg, initial, state, inputs, dtype, tolerance)


def test_kernels_equal_the_token_rule_in_a_stream_of_documents():
  check(rule(), True, 'float32', 5e-5)


@pytest.mark.slow
def test_a_stream_whose_last_chunk_is_filled_equals_the_token_rule():
  check(rule(), True, 'float32', 5e-5, length=2 * C)


@pytest.mark.slow
@pytest.mark.parametrize(
  'options,dtype',
  [
    ({}, 'float32'),
    ({'identity': ('k', 'v', 'mem')}, 'float32'),
    ({'adaptive': ('v', 'alpha'), 'retention': False}, 'float32'),
    ({}, 'bfloat16'),
  ],
)
def test_kernels_equal_the_token_rule_from_nothing(options, dtype):
  tolerance = 5e-5 if dtype == 'float32' else 6e-2
  check(rule(**options), False, dtype, tolerance, resets=False)


def test_derivatives_of_gelu():
  dots = Dots(jnp.dtype('float32'), True)
  x = jnp.linspace(-3.0, 3.0, 97)
  slope = jax.grad(jax.nn.gelu)
  want = jax.nn.gelu(x), jax.vmap(slope)(x), jax.vmap(jax.grad(slope))(x)
  for got, wanted in zip(gpu_deep.gelu(dots, x), want):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-5)


def test_kernels_lower_for_cuda_without_a_gpu():
  cfg = rule()
  initial = first_values(cfg)
  inputs = cases.inputs(cfg, jnp.float32)

  def loss(initial, query):
    here = inputs._replace(query=query)
    return jnp.sum(pallas_gpu.run(cfg, initial, None, here, 'bfloat16')[1])

  device = jax.sharding.AbstractDevice('NVIDIA H100', 132, 'gpu')
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((1,), ('x',), auto, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(initial, inputs.query)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  names = ('walk', 'output', 'output_back', 'turn', 'parts', 'collect')
  assert [name for name in names if f'memory_deep_{name}' not in text] == []


@pytest.mark.parametrize(
  'options,words',
  [
    ({'depth_rest': 2}, "two-layer memories .'k', 'v', 'mem'.*only `mem`"),
    ({'momentum': True}, 'momentum=True'),
    ({'delta': False}, 'delta=False'),
    ({'read': 'boundary'}, "read='boundary'"),
    ({'expansion': 3}, '48 hidden units'),
    ({'expansion': 32}, '512 hidden units'),
  ],
)
def test_what_does_not_fit_is_refused_in_words(options, words):
  cfg = rule(**options)
  inputs = cases.inputs(cfg, jnp.float32)
  with pytest.raises(pallas_gpu.DoesNotFit, match=words):
    pallas_gpu.run(cfg, {}, None, inputs, 'float32')


def test_kernels_are_taken_only_where_they_are_asked_for(monkeypatch):
  monkeypatch.setattr(pallas_gpu, 'capability', lambda: '9.0')
  with pytest.raises(pallas_gpu.DoesNotFit, match='a two-layer `mem`'):
    pallas_gpu.check_tried(rule(), 10**6)
