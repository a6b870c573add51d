"""GPU kernels read a long stream in pieces where no gradient is wanted."""

import functools

import jax
import jax.numpy as jnp
import memory_cases as cases
import pytest

from nestax.models.families import FAMILY
from nestax.models.memory import api, gpu_deep, gpu_pieces, pallas_gpu
from nestax.models.memory.types import MemoryConfig, init_state

C = 16


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """The smallest head, pieces of up to two chunks."""
  monkeypatch.setattr(cases, 'K', 16)
  monkeypatch.setattr(gpu_deep, 'SLICE', 16)
  monkeypatch.setattr(gpu_pieces, 'PIECE', 2)


def given(cfg, length, resets):
  initial = cases.initial_values(cfg, jnp.float32)
  initial = {name: x for name, x in initial.items() if name not in cfg.given}
  inputs = cases.inputs(cfg, jnp.float32, length, resets=resets)
  if cfg.momentum:  # that lasts from chunk to chunk
    inputs = inputs._replace(log_beta=0.1 * inputs.log_beta)
  return initial, inputs


def read_so_far(cfg, initial, before):
  """State of sequences that have read some tokens, others than each other."""
  states = []
  for b, length in enumerate(before):
    empty = init_state(cfg, cases.B, cases.H, cases.K)
    piece = cases.inputs(cfg, jnp.float32, length, seed=7 + b, resets=False)
    state, _ = api.run(cfg, initial, empty, piece, implementation='token')
    states.append(jax.tree.map(lambda x, b=b: x[b], state))
  return jax.tree.map(lambda *rows: jnp.stack(rows), *states)


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
  state = before and read_so_far(cfg, initial, before)
  length_B = counts and jnp.array(counts)
  end, out = by_kernels(cfg, initial, state, inputs, before == (C, C), length_B)
  for b, count in enumerate(counts or (length, length)):
    want = by_token(cfg, initial, state, inputs, b, count)
    got = jax.tree.map(lambda x, b=b: x[b : b + 1], (end, out))
    cases.assert_close((got[0], got[1][:, :count]), want, 1e-4)


@pytest.mark.parametrize('options', ({}, DEEP), ids=('hope', 'titans'))
def test_less_is_held_without_gradients_and_with_them_all_is_walked_at_once(
  options, monkeypatch
):
  cfg = MemoryConfig(chunk_mem=C, chunk_rest=C, **options)
  initial, inputs = given(cfg, 12 * C, resets=False)

  def read(initial):
    return pallas_gpu.run(cfg, initial, None, inputs, jnp.float32)[1]

  def held(f):
    compiled = jax.jit(f).lower(initial).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  def learn(initial):
    return jax.grad(lambda x: jnp.sum(jnp.sin(read(x))))(initial)

  pieces, grad = held(read), jax.make_jaxpr(learn)(initial)
  monkeypatch.setattr(gpu_pieces, 'PIECE', 64)
  # other functions, as what the same ones give is kept
  assert pieces < 0.7 * held(lambda x: read(x))
  assert str(jax.make_jaxpr(lambda x: learn(x))(initial)) == str(grad)


@pytest.mark.parametrize('chunks', (1, 2, 3, 5, 7, 8))
def test_every_chunk_is_walked_once_in_order(chunks, monkeypatch):
  sizes = []

  def whole(cfg, initial, slow, carry, xs, ends, dtype):
    sizes.append(len(ends))
    outs = []
    for i in range(len(ends)):
      carry = 3 * carry + xs[i] * ends[i]
      outs.append(carry + xs[i])
    return carry, jnp.stack(outs)

  xs, ends = jnp.arange(1.0, chunks + 1), jnp.arange(chunks) % 3 + 1
  args = None, None, None, jnp.float32(2.0), xs, ends
  want = whole(*args, None)
  for piece in (1, 2, 3, 4, 64):
    monkeypatch.setattr(gpu_pieces, 'PIECE', piece)
    sizes.clear()
    got = gpu_pieces.walk(whole, None, None, *args[1:])
    cases.assert_close(got, want, 1e-6)
    # no more than asked for, and as equal as can be
    least = -(-chunks // piece)
    assert max(sizes) == -(-chunks // least) and len(set(sizes)) <= 2
