"""With terms left out, the memory is each of the known linear recurrences."""

import jax
import jax.numpy as jnp
import memory_cases as cases
import numpy as np
import pytest

from nestax.models.memory import api
from nestax.models.memory.types import MemoryConfig

B, L, H, K = cases.B, cases.L, cases.H, cases.K

# `mem` alone writes, with slow keys, values and gates
ALONE = {'adaptive': (), 'identity': (), 'generated': False}
both = pytest.mark.parametrize('implementation', ['token', 'scan'])


def rule(chunk=4, **options):
  options = {'objective': 'dot', 'momentum': False} | ALONE | options
  return MemoryConfig(chunk_mem=chunk, chunk_rest=chunk, **options)


def read(cfg, initial, inputs, implementation):
  """Output of the memory in float64 (call under enable_x64)."""

  @jax.jit
  def run(initial, inputs):
    return api.run(
      cfg,
      initial,
      None,
      inputs,
      dtype=jnp.float64,
      implementation=implementation,
    )[1]

  return np.asarray(run(initial, inputs))


def made(cfg, zero=False):
  """Initial values (`mem` at 0 or not) and inputs in float64."""
  initial = cases.initial_values(cfg, jnp.float64)
  if zero:
    initial['mem'] = {'kernel': jnp.zeros((H, K, K), jnp.float64)}
  return initial, cases.inputs(cfg, jnp.float64)


def gate(initial, name, key_BxLxHxK):
  kernel, bias = (np.asarray(initial[name][x]) for x in ('kernel', 'bias'))
  logit = np.einsum('blhk,hk->blh', key_BxLxHxK, kernel) + bias
  return 1 / (1 + np.exp(-logit))


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def recurrence(start_HxKxK, inputs, value, update):
  """Reads `M_t q_t` where `M, S = update(M, S, k, v, index)`, by loops."""
  q, k = (unit(np.asarray(x)) for x in (inputs.query, inputs.key))
  out = np.zeros((B, L, H, K))
  for b, h in np.ndindex(B, H):
    M, S = start_HxKxK[h], np.zeros((K, K))
    for t in range(L):
      if inputs.reset[b, t]:
        M, S = start_HxKxK[h], np.zeros((K, K))
      at = (b, t, h)
      M, S = update(M, S, k[at], value[at], at)
      out[at] = M @ q[at]
  return out


@both
@pytest.mark.parametrize('anchor', ['initial', 'zero'])
def test_mem_alone_is_the_gated_delta_rule(implementation, anchor):
  cfg = rule(anchor=anchor, value_norm=False)
  with jax.enable_x64(True):
    # retention to zero makes the initial value the state that it starts from
    initial, inputs = made(cfg, zero=anchor == 'initial')
    key, value = np.asarray(inputs.key), np.asarray(inputs.value)
    alpha = gate(initial, 'alpha', key)
    beta = cfg.eta_max * gate(initial, 'eta', key) / alpha
    # ours writes eta v = alpha beta v where the delta rule writes beta v
    scaled = inputs._replace(value=inputs.value / alpha[..., None])
    got = read(cfg, initial, scaled, implementation)

  def update(M, S, k, v, at):
    erase = np.eye(K) - beta[at] * np.outer(k, k)
    return alpha[at] * M @ erase + beta[at] * np.outer(v, k), S

  start = np.asarray(initial['mem']['kernel'])
  cases.assert_close(got, recurrence(start, inputs, value, update), 1e-5)


@both
def test_an_initial_value_adds_to_what_the_gated_delta_rule_reads(
  implementation,
):
  cfg = rule()
  with jax.enable_x64(True):
    initial, inputs = made(cfg)
    empty, _ = made(cfg, zero=True)
    got = read(cfg, initial, inputs, implementation)
    plain = read(cfg, empty, inputs, implementation)
  query = unit(np.asarray(inputs.query))
  kernel = np.asarray(initial['mem']['kernel'])
  slow = np.einsum('hij,blhj->blhi', kernel, query)
  cases.assert_close(got, slow + plain, 1e-5)


@both
def test_without_retention_it_is_deltanet(implementation):
  cfg = rule(retention=False)
  with jax.enable_x64(True):
    initial, inputs = made(cfg, zero=True)
    beta = cfg.eta_max * gate(initial, 'eta', np.asarray(inputs.key))
    got = read(cfg, initial, inputs, implementation)

  def update(M, S, k, v, at):
    return M - beta[at] * np.outer(M @ k - v, k), S

  value = unit(np.asarray(inputs.value))
  want = recurrence(np.zeros((H, K, K)), inputs, value, update)
  cases.assert_close(got, want, 1e-5)


@both
@pytest.mark.parametrize('retention', [True, False])
def test_without_delta_it_is_linear_attention(implementation, retention):
  # with a constant decay, RetNet in its parallel form
  cfg = rule(delta=False, retention=retention)
  with jax.enable_x64(True):
    initial, inputs = made(cfg, zero=True)
    inputs = inputs._replace(reset=None)
    initial['alpha']['kernel'] = jnp.zeros((H, K), jnp.float64)
    got = read(cfg, initial, inputs, implementation)
  q, k, v = (
    unit(np.asarray(x)) for x in (inputs.query, inputs.key, inputs.value)
  )
  eta = cfg.eta_max * gate(initial, 'eta', np.asarray(inputs.key))
  gamma = 1 / (1 + np.exp(-2.0)) if retention else 1.0
  age = np.arange(L)[:, None] - np.arange(L)[None]
  decay = np.where(age >= 0, gamma ** np.maximum(age, 0), 0)
  weights = np.einsum('bthk,bihk->bhti', q, k) * decay
  want = np.einsum('bhti,bih,bihk->bthk', weights, eta, v)
  cases.assert_close(got, want, 1e-5)


@both
def test_one_token_chunks_without_delta_are_titans_linear_memory(
  implementation,
):
  cfg = rule(1, objective='l2', momentum=True, delta=False, anchor='zero')
  with jax.enable_x64(True):
    initial, inputs = made(cfg)
    key = np.asarray(inputs.key)
    theta = cfg.eta_max * gate(initial, 'eta', key)
    alpha, eta = gate(initial, 'alpha', key), np.exp(inputs.log_beta)
    got = read(cfg, initial, inputs, implementation)

  def update(M, S, k, v, at):
    S = eta[at] * S - theta[at] * np.outer(M @ k - v, k)
    return alpha[at] * M + S, S

  start, value = np.asarray(initial['mem']['kernel']), np.asarray(inputs.value)
  want = recurrence(start, inputs, unit(value), update)
  cases.assert_close(got, want, 1e-5)


@both
def test_delta_gradient_descent_shrinks_a_key_by_alpha_minus_two_eta(
  implementation,
):
  # the decay along the key and the L2 gradient subtract eta each
  cfg = rule(1, objective='l2', anchor='zero', value_norm=False)
  k, across = np.eye(K)[:2]
  with jax.enable_x64(True):
    initial, inputs = made(cfg)
    shape = inputs.key.shape
    same = inputs._replace(
      query=jnp.stack([jnp.broadcast_to(x, shape[1:]) for x in (k, across)]),
      key=jnp.broadcast_to(jnp.asarray(k), shape),
      value=jnp.zeros(shape, jnp.float64),
      reset=None,
    )
    got = read(cfg, initial, same, implementation)
  key = np.asarray(same.key)
  alpha = gate(initial, 'alpha', key)[0, 0]
  eta = cfg.eta_max * gate(initial, 'eta', key)[0, 0]
  times = 1 + np.arange(L)[:, None]
  slow = np.asarray(initial['mem']['kernel'])
  along = ((alpha - 2 * eta) ** times)[..., None] * (slow @ k)
  orthogonal = (alpha**times)[..., None] * (slow @ across)
  cases.assert_close(got[0], along, 1e-4)
  cases.assert_close(got[1], orthogonal, 1e-4)
