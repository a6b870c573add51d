"""Attention against a plain softmax over rotated queries and keys."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.models import (
  attention,
  axes,
  flash_gpu,
  flash_tpu,
  fresh_attention,
)
from nestax.models.config import ModelConfig
from nestax.models.memory.api import say_once
from nestax.models.persistent import Persistent

B, L, D = 2, 11, 16
CASES = {
  'all_heads': {},
  'grouped': {'H': 4, 'G': 2},
  'one_key_head': {'H': 4, 'G': 1},
  'window': {'window': 4},
  'window_of_one': {'window': 1},
  'grouped_window': {'H': 4, 'G': 2, 'window': 3, 'K': 6, 'rope_base': 50.0},
}


@functools.cache
def build(name):
  options = {'D': D, 'H': 2, 'dtype': 'float32'} | CASES[name]
  cfg = ModelConfig('transformer', **options)
  module = attention.Attention(cfg)
  shapes = jax.eval_shape(module.init, jax.random.key(0), None, stream(1))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: (rng.normal(size=x.shape) * D**-0.5).astype(np.float32),
    nn.unbox(shapes),
  )
  return cfg, variables, jax.jit(module.apply)


def stream(length=L):
  rng = np.random.default_rng(1)
  return 2 * rng.normal(size=(B, length, D)).astype(np.float32)


def resets():
  reset = np.zeros((B, L), bool)
  reset[[0, 1, 1, 1], [4, 0, 7, 8]] = True
  return reset


def rotate(x_LxHxK, base):
  """RoPE as a product of complex numbers, `(i, i + K/2)` one of them."""
  half = x_LxHxK.shape[-1] // 2
  angle = np.arange(len(x_LxHxK))[:, None] * base ** (-np.arange(half) / half)
  z = x_LxHxK[..., :half] + 1j * x_LxHxK[..., half:]
  z = z * np.exp(1j * angle)[:, None]
  return np.concatenate([z.real, z.imag], axis=-1)


def naive(cfg, params, x_BxLxD, reset_BxL):
  """One query at a time, in float64."""
  W = {
    name: np.asarray(params[name]['kernel'], np.float64)
    for name in ('query', 'key', 'value', 'out')
  }
  out = np.zeros(x_BxLxD.shape)
  for b, x_LxD in enumerate(np.asarray(x_BxLxD, np.float64)):
    q = rotate(np.einsum('ld,dhk->lhk', x_LxD, W['query']), cfg.rope_base)
    k = rotate(np.einsum('ld,dhk->lhk', x_LxD, W['key']), cfg.rope_base)
    v = np.einsum('ld,dhk->lhk', x_LxD, W['value'])
    start = 0
    for t in range(len(x_LxD)):
      start = t if reset_BxL is not None and reset_BxL[b, t] else start
      first = max(start, t + 1 - cfg.window) if cfg.window else start
      for h in range(cfg.H):
        shared = h // (cfg.H // cfg.kv_heads)
        logit = k[first : t + 1, shared] @ q[t, h] / np.sqrt(cfg.head_width)
        weight = np.exp(logit - logit.max())
        read = weight / weight.sum() @ v[first : t + 1, shared]
        out[b, t] += read @ W['out'][h]
  return out


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('reset', [None, resets()], ids=['', 'resets'])
def test_fresh_and_cached_attention_equal_a_plain_softmax(name, reset):
  cfg, variables, run = build(name)
  want = naive(cfg, variables['params'], stream(), reset)
  state, fresh = run(variables, None, stream(), reset)
  assert state is None
  np.testing.assert_allclose(fresh, want, atol=2e-5)
  empty = attention.init_state(cfg, B, L)
  _, cached = run(variables, empty, stream(), reset)
  np.testing.assert_allclose(cached, want, atol=2e-5)


@pytest.mark.parametrize('name', ['window', 'grouped_window', 'window_of_one'])
@pytest.mark.parametrize('piece', [1, 15])
def test_a_ring_as_long_as_the_window_serves_a_stream_of_any_length(
  name, piece
):
  cfg, variables, run = build(name)
  long = stream(60)
  _, want = run(variables, None, long)
  state = attention.init_state(cfg, B, 10**9)
  assert state.key_BxSxGxK.shape[1] == cfg.window
  size = jax.tree.map(np.shape, state)
  out = []
  for at in range(0, 60, piece):
    state, y = run(variables, state, long[:, at : at + piece])
    out.append(y)
  np.testing.assert_allclose(np.concatenate(out, axis=1), want, atol=2e-5)
  assert jax.tree.map(np.shape, state) == size
  assert np.all(state.clock_B == 60)
  kept = np.sort(state.position_BxS[0])
  np.testing.assert_array_equal(kept, np.arange(60 - cfg.window, 60))


def test_a_document_in_a_ring_does_not_see_the_one_before():
  cfg, variables, run = build('window')
  state = attention.init_state(cfg, B, L)
  state, _ = run(variables, state, stream(7))
  begins = np.asarray([[True], [False]])
  state, _ = run(variables, state, stream(1), begins)
  _, got = run(variables, state, stream(2)[:, 1:])
  _, alone = run(variables, None, stream(2))
  # the first sequence began anew one token ago, the second goes on
  np.testing.assert_allclose(got[0], alone[0, 1:], atol=2e-5)
  assert np.abs(got[1] - alone[1, 1:]).max() > 1e-2


# 4 heads over tensor and sequence, with shared keys repeated; 2 heads, which
# leave lengths split; and a mask
@pytest.mark.parametrize(
  'name,reset', [('grouped', True), ('all_heads', False)]
)
def test_attention_on_a_mesh_is_attention_on_one_device(name, reset):
  _, variables, run = build(name)
  x_BxLxD = stream(12)
  reset_BxL = np.pad(resets(), ((0, 0), (0, 1))) if reset else None

  def total(variables, x):
    _, y = run(variables, None, x, reset_BxL)
    return jnp.sum(jnp.sin(y)), y

  grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
  want = grads(variables, x_BxLxD)
  sizes = {'data': 2, 'tensor': 2, 'sequence': 2}
  mesh = jax.make_mesh(
    tuple(sizes.values()), tuple(sizes),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )  # fmt: skip
  with jax.set_mesh(mesh):
    got = grads(variables, x_BxLxD)
  assert not got[0][1].sharding.is_fully_replicated
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want
  )


def test_cudnn_is_asked_for_what_it_takes(monkeypatch):
  monkeypatch.setattr(flash_gpu, 'capability', lambda: '9.0')
  asked = [
    fresh_attention._cudnn(jax.ShapeDtypeStruct((2, length, 2, K), dtype))
    for length, K, dtype in (
      (127, 8, 'bfloat16'),
      (128, 8, 'bfloat16'),
      (128, 8, 'float32'),
      (128, 12, 'bfloat16'),
      (128, 160, 'bfloat16'),
    )
  ]
  assert asked == [False, True, False, False, False]


# documents, persistent tokens, bfloat16, width -> who attends on a GPU
@pytest.mark.parametrize(
  'documents,persistent,dtype,K,want',
  [
    (False, False, 'bfloat16', 64, 'cudnn'),
    (True, False, 'bfloat16', 64, 'blocks'),
    (False, True, 'bfloat16', 64, 'blocks'),
    (False, False, 'float32', 64, 'blocks'),
    (True, False, 'bfloat16', 96, 'all logits'),
    (False, False, 'bfloat16', 96, 'cudnn'),
  ],
)
def test_who_attends_on_a_gpu(
  monkeypatch, caplog, documents, persistent, dtype, K, want
):
  asked = []

  def by_jax(q, *args, implementation='xla', **options):
    asked.append('cudnn' if implementation == 'cudnn' else 'all logits')
    return q[..., :K]

  def in_blocks(q, k, v, first, interpret):
    asked.append('blocks')
    return q, jnp.zeros((2, 2, 128))

  monkeypatch.setattr(axes, 'platform', lambda: 'gpu')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_jax)
  monkeypatch.setattr(flash_gpu, 'attention', in_blocks)
  monkeypatch.setattr(flash_gpu, 'capability', lambda: '9.0')
  say_once.cache_clear()
  q = jnp.zeros((2, 128, 2, K), dtype)
  start = jnp.zeros((2, 128), jnp.int32) if documents else None
  first = Persistent(q, *[jnp.zeros((3, 2, K), dtype)] * 2)
  for _ in range(2):
    fresh_attention.read(0, True, q, q, q, start, first if persistent else None)
  assert asked == [want] * 2
  said = [record.message for record in caplog.records]
  assert len(said) == (want == 'all logits'), 'no silent fallback, said once'
  assert all('heads of width 96' in words for words in said)
  fresh_attention.read(0, False, q, q, q, start, first if persistent else None)
  assert asked[2] == 'all logits'
  assert 'lengths are split' in caplog.records[-1].message
  monkeypatch.setattr(flash_gpu, 'capability', lambda: '7.5')
  assert "compute capability '7.5'" in flash_gpu.unfit(dtype, 64)
  assert not fresh_attention._cudnn(q.astype(jnp.bfloat16))


# of documents and persistent tokens, who attends on a TPU
@pytest.mark.parametrize(
  'fused,documents,persistent,dtype,want',
  [
    (True, False, False, 'bfloat16', 'kernels'),
    (True, True, False, 'float32', 'kernels'),
    (True, True, True, 'bfloat16', 'xla'),
    (False, True, False, 'bfloat16', 'xla'),
    (True, True, False, 'float16', 'xla'),
  ],
)
def test_who_attends_on_a_tpu(
  monkeypatch, fused, documents, persistent, dtype, want
):
  asked = []

  def kernels(q, k, v, start, *, window):
    asked.append('kernels')
    return q

  monkeypatch.setattr(flash_tpu, 'attention', kernels)
  monkeypatch.setattr(axes, 'platform', lambda: 'tpu')
  q = jnp.zeros((2, 16, 2, 8), dtype)
  start = jnp.zeros((2, 16), jnp.int32) if documents else None
  first = Persistent(q, *[jnp.zeros((3, 2, 8), dtype)] * 2)
  first = first if persistent else None
  fresh_attention.read(0, fused, q, q, q, start, first)
  assert (asked or ['xla']) == [want]


@pytest.mark.parametrize(
  'there,dtype,K,words',
  [
    ('gfx90a', jnp.bfloat16, 64, "capability 'gfx90a'"),
    ('8.6', jnp.bfloat16, 64, ''),
    ('8.6', jnp.float32, 64, 'float32 heads of width 64'),
    ('8.0', jnp.float32, 128, ''),
  ],
)
def test_blocks_are_for_gpus_that_hold_them(
  monkeypatch, there, dtype, K, words
):
  monkeypatch.setattr(flash_gpu, 'capability', lambda: there)
  said = flash_gpu.unfit(dtype, K)
  assert words in said and bool(said) == bool(words)
