"""GPU kernels take long streams in pieces: to read them, or with a stride."""

import functools

import jax
import jax.numpy as jnp
import memory_cases as cases
import pytest

from nestax.models.families import FAMILY
from nestax.models.memory import api, gpu_deep, gpu_pieces, pallas_gpu
from nestax.models.memory.types import MemoryConfig

C = 16


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """The smallest head, pieces of up to two chunks."""
  monkeypatch.setattr(cases, 'K', 16)
  monkeypatch.setattr(gpu_deep, 'SLICE', 16)
  monkeypatch.setattr(gpu_pieces, 'ROOM', 0)
  monkeypatch.setattr(gpu_pieces, 'PIECE', 2)
  monkeypatch.setattr(gpu_pieces, 'SHORT', 2)


def given(cfg, length, resets):
  initial = cases.initial_values(cfg, jnp.float32)
  initial = {name: x for name, x in initial.items() if name not in cfg.given}
  inputs = cases.inputs(cfg, jnp.float32, length, resets=resets)
  if cfg.momentum:  # that lasts from chunk to chunk
    inputs = inputs._replace(log_beta=0.1 * inputs.log_beta)
  return initial, inputs


@functools.partial(jax.jit, static_argnums=(0, 4))
def by_kernels(cfg, initial, state, inputs, aligned=False, length_B=None):
  return pallas_gpu.run(
    cfg, initial, state, inputs, jnp.float32, length_B, aligned
  )


def by_token(cfg, initial, state, inputs, b, count):
  """What one row gives that ends after so many tokens."""
  row = jax.tree.map(lambda x: x[b : b + 1, :count], inputs)
  begun = jax.tree.map(lambda x: x[b : b + 1], state)
  return api.run(cfg, initial, begun, row, implementation='token')


DEEP = FAMILY['titans'].rule | {'depth_mem': 2, 'expansion': 4}
# rule, tokens, what both sequences have read before (None: fresh), lengths
STREAMS = {
  'fresh': ({}, 4 * C + 5, None, None),
  'inside': ({'momentum': True}, 5 * C + 3, (C, 3), None),
  'lengths': ({}, 5 * C, (C, C), (5 * C, 2 * C + 7)),
  'inside_lengths': (DEEP, 6 * C, (5, C), (C + 2, 6 * C - 3)),
}


@pytest.mark.parametrize('name', STREAMS)
def test_pieces_equal_the_token_rule(name):
  options, length, before, counts = STREAMS[name]
  cfg = MemoryConfig(chunk_mem=C, chunk_rest=C, **options)
  initial, inputs = given(cfg, length, resets=True)
  state = before and cases.read_so_far(cfg, initial, before)
  length_B = counts and jnp.array(counts)
  end, out = by_kernels(cfg, initial, state, inputs, before == (C, C), length_B)
  for b, count in enumerate(counts or (length, length)):
    want = by_token(cfg, initial, state, inputs, b, count)
    got = jax.tree.map(lambda x, b=b: x[b : b + 1], (end, out))
    cases.assert_close((got[0], got[1][:, :count]), want, 1e-4)


@pytest.mark.parametrize(
  'name,stride', [('fresh', 3), ('inside', 2), ('inside_lengths', 2)]
)
def test_gradients_of_pieces_walked_again_are_those_of_all_at_once(
  name, stride
):
  options, length, before, counts = STREAMS[name]
  options = {'chunk_mem': C, 'chunk_rest': C} | options
  cfg = MemoryConfig(**options)
  initial, inputs = given(cfg, length, resets=True)
  state = before and cases.read_so_far(cfg, initial, before)
  reset, length_B = inputs.reset, counts and jnp.array(counts)

  def learned(cfg):
    def values(initial, fast, streams):
      begun = None
      if state is not None:
        begun = state._replace(boundary=fast[0], running=fast[0])
        begun = begun._replace(momentum=fast[1])
      here = streams._replace(reset=reset)
      end, out = pallas_gpu.run(
        cfg, initial, begun, here, jnp.float32, length_B, before == (C, C)
      )
      return out, end and end[:3]

    fast = state and (state.running, state.momentum)
    streams = inputs._replace(reset=None)
    got, back = jax.vjp(values, initial, fast, streams)
    return got, back(jax.tree.map(lambda x: jnp.cos(3 * x), got))

  cases.assert_close(
    jax.jit(lambda: learned(MemoryConfig(**options, stride=stride)))(),
    jax.jit(lambda: learned(cfg))(),
    3e-5,
  )


def held(f, *args):
  compiled = jax.jit(f).lower(*args).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('options', ({}, DEEP), ids=('hope', 'titans'))
def test_pieces_hold_less_and_without_a_stride_training_has_none(
  options, monkeypatch
):
  options = {'chunk_mem': C, 'chunk_rest': C} | options
  cfg = MemoryConfig(**options)
  initial, inputs = given(cfg, 12 * C, resets=False)

  def read(initial, cfg=cfg):
    return pallas_gpu.run(cfg, initial, None, inputs, jnp.float32)[1]

  def learn(initial, cfg=cfg):
    return jax.grad(lambda x: jnp.sum(jnp.sin(read(x, cfg))))(initial)

  again = MemoryConfig(**options, stride=2)
  few = held(read, initial), held(lambda x: learn(x, again), initial)
  jaxpr = jax.make_jaxpr(learn)(initial)
  monkeypatch.setattr(gpu_pieces, 'PIECE', 64)
  # other functions, as what the same ones give is kept
  every = held(lambda x: read(x), initial), held(learn, initial)
  assert few[0] < 0.7 * every[0] and few[1] < 0.45 * every[1]
  assert str(jax.make_jaxpr(lambda x: learn(x))(initial)) == str(jaxpr)


@pytest.mark.parametrize('chunks', (1, 2, 3, 5, 7, 8))
def test_every_chunk_is_walked_once_in_order(chunks, monkeypatch):
  sizes = []

  def whole(cfg, initial, slow, carry, xs, ends, dtype):
    sizes.append(len(ends))
    (boundary, state), outs = carry, []
    for i in range(len(ends)):
      state = 3 * state + xs[i] * ends[i]
      outs.append(state + xs[i])
    return (boundary, state), jnp.stack(outs)

  xs, ends = jnp.arange(1.0, chunks + 1), jnp.arange(chunks) % 3 + 1
  carry = None, jnp.full((4,), 2.0)  # of 16 bytes
  args = None, None, None, carry, xs, ends
  want = whole(*args, None)
  for piece in (1, 2, 3, 4, 64):
    monkeypatch.setattr(gpu_pieces, 'PIECE', piece)
    sizes.clear()
    got = gpu_pieces.walk(whole, None, None, *args[1:])
    cases.assert_close(got, want, 1e-6)
    # no more than asked for, and as equal as can be
    least = -(-chunks // piece)
    assert set(sizes) == {-(-chunks // least), chunks // least}
  monkeypatch.setattr(gpu_pieces, 'PIECE', 1)
  monkeypatch.setattr(gpu_pieces, 'ROOM', 16 * 4 + 15)  # of four chunks
  sizes.clear()
  cases.assert_close(gpu_pieces.walk(whole, None, None, *args[1:]), want, 1e-6)
  assert max(sizes) == -(-chunks // -(-chunks // 4))
