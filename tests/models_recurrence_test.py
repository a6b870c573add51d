"""The memory on a mesh: every device its own walks, and the same numbers."""

import functools

import jax
import jax.numpy as jnp
import memory_cases as cases
import numpy as np
import pytest
from jax.sharding import AxisType

from nestax.models import recurrence
from nestax.models.memory import api, pallas_gpu
from nestax.models.memory.types import Inputs, MemoryConfig, init_state

B, L = 2, 20  # the last chunk is not full
SIZES = {'data': 2, 'tensor': 2, 'sequence': 2}


def mesh(**sizes):
  kinds = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def drawn(H, K):
  """Arguments of a stream that goes on: initial values, fast parts, inputs."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  initial = {
    box: {'kernel': 0.5 * normal(H, K, K) / K**0.5} for box in ('k', 'v', 'mem')
  }
  for gate, bias in (('eta', 0.0), ('alpha', 2.0)):
    kernel = normal(H, K) / K**0.5
    initial[gate] = {'kernel': kernel, 'bias': np.full(H, bias, np.float32)}
  fast = 0.1 * normal(B, H, 3 * K + 2, K)
  reset = rng.random((B, L)) < 0.1
  return initial, fast, Inputs(*normal(3, B, L, H, K), None, reset)


@functools.cache
def everything(implementation, H=4, K=4, C=8, aligned=True):
  """The compiled walk: outputs, end state, gradients of all that is real."""
  cfg = MemoryConfig(C, C)

  def values(initial, fast, streams, inputs):
    state = init_state(cfg, B, H, K)
    weights = state.running._replace(stack=fast)
    state = state._replace(boundary=weights, running=weights)
    inputs = inputs._replace(**streams)
    end, out = recurrence.run(
      cfg, initial, state, inputs, implementation=implementation,
      aligned=aligned,
    )  # fmt: skip
    total = jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(3 * end.running.stack))
    return total, (out, end)

  @jax.jit
  def run(initial, fast, inputs):
    streams = {n: getattr(inputs, n) for n in ('query', 'key', 'value')}
    grad = jax.value_and_grad(values, (0, 1, 2), has_aux=True)
    (_, (out, end)), grads = grad(initial, fast, streams, inputs)
    return out, end, grads

  return run


@pytest.mark.parametrize('implementation', ['scan', 'pallas'])
def test_walks_on_a_mesh_equal_walks_on_one_device(implementation):
  args = drawn(4, 4)
  want = everything('scan')(*args)
  with jax.set_mesh(mesh(**SIZES)):
    got = everything(implementation)(*args)
  # a sequence and one of four heads a device, all tokens of them
  assert got[0].sharding.shard_shape(got[0].shape) == (B // 2, L, 1, 4)
  fast = got[1].running.stack
  assert fast.sharding.shard_shape(fast.shape) == (B // 2, 1, 14, 4)
  cases.assert_close(got, want, 2e-5)


@pytest.mark.slow
def test_the_gpus_kernels_on_a_mesh_equal_scan(monkeypatch):
  monkeypatch.setattr(api, '_kernels', lambda: pallas_gpu)
  args = drawn(4, 16)
  want = everything('scan', K=16, C=16)(*args)
  with jax.set_mesh(mesh(**SIZES)):
    got = everything('pallas', K=16, C=16)(*args)
  cases.assert_close(got, want, 3e-5)


def test_heads_that_do_not_divide_are_walked_by_all():
  cfg, (initial, _, inputs) = MemoryConfig(8, 8), drawn(3, 4)
  run = jax.jit(lambda *args: recurrence.run(cfg, args[0], None, args[1])[1])
  want = run(initial, inputs)
  with jax.set_mesh(mesh(data=2, tensor=4)):
    got = run(initial, inputs)
  assert got.sharding.shard_shape(got.shape) == (B // 2, L, 3, 4)
  cases.assert_close(got, want, 1e-6)
