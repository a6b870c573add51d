"""Configurations and inputs shared by the tests of the memory."""

import jax
import jax.numpy as jnp
import numpy as np

from nestax.models.memory import api
from nestax.models.memory.types import Inputs, MemoryConfig, init_state

B, L, H, K = 2, 13, 2, 4

# name -> (chunk_mem, chunk_rest, options); every option appears at least once
CASES = {
  'default': (4, 4, {}),
  'no_momentum': (4, 4, {'momentum': False}),
  'one_token_chunks': (1, 1, {}),
  'one_chunk': (16, 16, {}),
  'mem_slower': (8, 2, {}),
  'rest_slower': (4, 8, {'momentum': False}),
  'deep_mem': (4, 4, {'depth_mem': 2}),
  'deep_rest': (4, 8, {'depth_rest': 2, 'momentum': False}),
  'deep': (8, 4, {'depth_mem': 2, 'depth_rest': 2}),
  'unbounded': (4, 4, {'depth_mem': 2, 'bounded': False}),
  'boundary_read': (4, 4, {'read': 'boundary'}),
  'deep_boundary_read': (4, 4, {'read': 'boundary', 'depth_mem': 2}),
  'anchor_zero': (4, 4, {'anchor': 'zero'}),
  'running': (1, 8, {'momentum': False, 'eta_max': 1.0}),
  'running_zero': (1, 4, {'momentum': False, 'anchor': 'zero'}),
  'running_dot': (
    1,
    5,
    {'momentum': False, 'objective': 'dot', 'delta': False},
  ),
  'deep_anchor_zero': (
    4,
    4,
    {'anchor': 'zero', 'depth_mem': 2, 'momentum': False},
  ),
  'adaptive_q': (4, 4, {'adaptive': ('q', 'k', 'v', 'eta', 'alpha')}),
  'slow_gates': (4, 4, {'adaptive': ('k', 'v')}),
  'dot': (4, 4, {'objective': 'dot', 'identity': ('k', 'mem')}),
  'mem_alone': (
    4,
    4,
    {
      'adaptive': (),
      'identity': (),
      'generated': False,
      'objective': 'dot',
      'momentum': False,
    },
  ),
  'titans': (4, 4, {'adaptive': (), 'generated': False, 'delta': False}),
  'no_retention': (4, 4, {'retention': False, 'value_norm': False}),
  'no_remat': (4, 4, {'remat': False}),
  'stride': (4, 4, {'stride': 3}),
  'given': (4, 4, {'adaptive': ('k',), 'given': ('eta', 'alpha')}),
  'given_rate': (
    4,
    4,
    {'adaptive': ('v',), 'given': ('eta',), 'retention': False},
  ),
  'plain_keys': (4, 4, {'key_norm': False, 'delta': False, 'objective': 'dot'}),
  # several options at once, each of which also stands alone above
  'adaptive_boundary_read': (
    4,
    4,
    {
      'adaptive': ('q', 'k', 'v', 'eta', 'alpha'),
      'read': 'boundary',
      'value_norm': False,
    },
  ),
  'plain_keys_through_k': (
    4,
    4,
    {
      'key_norm': False,
      'delta': False,
      'objective': 'dot',
      'identity': ('k', 'mem'),
    },
  ),
}


def config(name: str) -> MemoryConfig:
  chunk_mem, chunk_rest, options = CASES[name]
  options = {'momentum': True} | options
  return MemoryConfig(
    chunk_mem=chunk_mem, chunk_rest=chunk_rest, expansion=2, **options
  )


def initial_values(cfg: MemoryConfig, dtype, seed: int = 0):
  """Large enough initial values and gates for every term to matter."""
  keys = iter(jax.random.split(jax.random.key(seed), 32))
  F = K * cfg.expansion

  def normal(*shape):
    x = jax.random.normal(next(keys), shape, dtype)
    return 0.5 * x / np.sqrt(shape[-1])

  initial = {}
  for box in cfg.boxes:
    deep = {'inner': normal(H, F, K), 'outer': normal(H, K, F)}
    flat = {'kernel': normal(H, K, K)}
    initial[box] = deep if box in cfg.deep else flat
  for gate, bias in (('eta', 0.0), ('alpha', 2.0)):
    initial[gate] = {'kernel': normal(H, K), 'bias': jnp.full((H,), bias)}
  return initial


def inputs(cfg: MemoryConfig, dtype, length: int = L, seed=1, resets=True):
  keys = jax.random.split(jax.random.key(seed), 7)
  q, k, v = (
    jax.random.normal(key, (B, length, H, K), dtype) for key in keys[:3]
  )
  log_beta = None
  if cfg.momentum:
    logit = jax.random.normal(keys[3], (B, length, H), dtype)
    log_beta = jax.nn.log_sigmoid(logit)
  reset = jax.random.bernoulli(keys[4], 0.15, (B, length)) if resets else None
  gates = {}
  for gate, name in (('eta', 'eta'), ('alpha', 'log_alpha')):
    if gate in cfg.given:
      logit = jax.random.normal(keys[5 + (gate == 'alpha')], q.shape[:3], dtype)
      log = jax.nn.log_sigmoid(logit)
      gates[name] = log if gate == 'alpha' else jnp.exp(log)
  return Inputs(q, k, v, log_beta, reset, **gates)


def read_so_far(cfg: MemoryConfig, initial, before=(0, 3), dtype=jnp.float32):
  """State of sequences that have read so many tokens, by the token rule."""
  states = []
  for b, length in enumerate(before):
    state = init_state(cfg, B, H, K, dtype)
    if length:
      piece = inputs(cfg, dtype, length, seed=7 + b, resets=False)
      state, _ = api.run(cfg, initial, state, piece, implementation='token')
    states.append(jax.tree.map(lambda x, b=b: x[b], state))
  return jax.tree.map(lambda *rows: jnp.stack(rows), *states)


def assert_close(got, want, tolerance):
  """Every leaf within `tolerance` of the wanted leaf's largest entry."""
  got, want = jax.tree.leaves(got), jax.tree.leaves(want)
  assert len(got) == len(want)
  for g, w in zip(got, want):
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    assert np.all(np.isfinite(g))
    scale = max(np.max(np.abs(w), initial=0.0), 1e-6)
    np.testing.assert_allclose(g / scale, w / scale, atol=tolerance)
