"""Mixers written as plain loops over their equations, in numpy and float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestax.models.config import ModelConfig

B, L, D, H, K = 2, 12, 12, 2, 4


def config(family, **values):
  """Chunks of four tokens."""
  memory = {'chunk_mem': 4, 'chunk_rest': 4}
  sizes = {'D': D, 'H': H, 'K': K, 'N': 1, 'V': 8, 'dtype': 'float32'}
  return ModelConfig.from_dict(
    sizes | {'family': family, 'memory': memory} | values
  )


def assert_is_its_equations(mixer, plain):
  """Two rows, of which one holds two documents, the second from inside a chunk.

  Args:
    mixer: the module.
    plain: `(params, x_LxD, start) -> y_LxD` of one document, which begins
      `start` tokens after the start of a chunk.
  """
  x = jax.random.normal(jax.random.key(1), (B, L, D))
  reset = jnp.zeros((B, L), bool).at[1, 5].set(True)
  boxed = jax.jit(mixer.init)(jax.random.key(0), None, x[:, :1])['params']
  leaves, tree = jax.tree.flatten(nn.unbox(boxed))
  rng = np.random.default_rng(0)
  # far enough from first values for every term to matter
  leaves = [x + 0.3 * rng.normal(size=x.shape).astype('f') for x in leaves]
  params = jax.tree.unflatten(tree, leaves)
  got = np.asarray(jax.jit(mixer.apply)({'params': params}, None, x, reset)[1])
  x = np.asarray(x, np.float64)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for row, start, stop in [(0, 0, L), (1, 0, 5), (1, 5, L)]:
    want = plain(params, x[row, start:stop], start)
    np.testing.assert_allclose(got[row, start:stop], want, atol=2e-4)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def softplus(x):
  return np.log1p(np.exp(x))


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rms(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def project(p, x_LxD, name):
  """A projection with its convolution over the last four tokens and SiLU."""
  y = np.einsum('ld,dhk->lhk', x_LxD, p[name]['kernel'])
  taps = p[f'{name}_conv']['kernel']
  padded = np.concatenate([np.zeros((3, H, K)), y])
  return silu(sum(taps[i] * padded[i : i + len(y)] for i in range(4)))


def from_heads(y_LxHxK, linear):
  return np.einsum('lhk,hkd->ld', y_LxHxK, linear['kernel'])


def rotated(x_LxHxK, start=0):
  """Pairs `(i, i + K / 2)` as complex numbers, turned by `n theta_i`."""
  z = x_LxHxK[..., : K // 2] + 1j * x_LxHxK[..., K // 2 :]
  theta = 10_000.0 ** (-np.arange(K // 2) / (K // 2))
  z = z * np.exp(1j * (start + np.arange(len(z)))[:, None] * theta)[:, None]
  return np.concatenate([z.real, z.imag], -1)


def recurrence(q, k, v, a, b, erase):
  """`D = a D (I - b k k^T) + b v k^T`, or without the erasing; `D q`."""
  out = np.zeros_like(v)
  for h in range(H):
    M = np.zeros((K, K))
    for t in range(len(q)):
      key, value = k[t, h], v[t, h]
      M = a[t, h] * M
      if erase:
        M = M @ (np.eye(K) - b[t, h] * np.outer(key, key))
      M = M + b[t, h] * np.outer(value, key)
      out[t, h] = M @ q[t, h]
  return out


def logit(p, x, name):
  return x @ p['gates'][name]['kernel'] + p['gates'].get(f'{name}_bias', 0)


def deltanet(p, x, start):
  q, k, v = (project(p, x, n) for n in ('query', 'key', 'value'))
  b = sigmoid(logit(p, x, 'write'))
  o = recurrence(unit(q), unit(k), v, np.ones_like(b), b, True)
  return from_heads(rms(o, p['norm']['scale']), p['out'])


def gate(p, x):
  return silu(np.einsum('ld,dhk->lhk', x, p['gate']['kernel']))


def gated_deltanet(p, x, start):
  q, k, v = (project(p, x, n) for n in ('query', 'key', 'value'))
  b = sigmoid(logit(p, x, 'write'))
  a = np.exp(-np.exp(p['gates']['log_rate']) * softplus(logit(p, x, 'step')))
  o = recurrence(unit(q), unit(k), v, a, b, True)
  return from_heads(rms(o, p['norm']['scale']) * gate(p, x), p['out'])


def retnet(p, x, start):
  q, k, v = (
    np.einsum('ld,dhk->lhk', x, p[n]['kernel'])
    for n in ('query', 'key', 'value')
  )
  a = np.broadcast_to(1 - 2.0 ** np.array([-5, -6]), (len(x), H))
  o = recurrence(rotated(q), rotated(k) / 2, v, a, np.ones_like(a), False)
  return from_heads(rms(o, p['norm']['scale']) * gate(p, x), p['out'])


def mamba2(p, x, start):
  q, k, v = (project(p, x, n) for n in ('query', 'key', 'value'))
  d = softplus(logit(p, x, 'step'))
  a = np.exp(-np.exp(p['gates']['log_rate']) * d)
  o = recurrence(q, k, v, a, d, False) + p['skip'][:, None] * v
  y = (o * gate(p, x)).reshape(len(x), H * K)
  y = rms(y, p['norm']['scale']).reshape(len(x), H, K)
  return from_heads(y, p['out'])


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gradients(W, k, v, identity):
  """(key, error) of each layer of a map, outer layer last, as it is written."""
  e = identity * k - v
  if len(W) == 1:
    return [(k, W[0] @ k + e)]
  z, h = W[0] @ k, gelu(W[0] @ k)
  e = e + W[1] @ h
  slope = (gelu(z + 1e-5) - gelu(z - 1e-5)) / 2e-5
  below = slope * (W[1].T @ e)
  gain = max(1, below @ below / (e @ e + 1e-6))
  return [(k, below / gain), (unit(h), e / max(1, np.linalg.norm(h)))]


def regression(p, q, k, v, eta, alpha, beta, start, identity=0.0):
  """Titans and TTT: gradients at the chunk's start; chunks of four tokens."""
  initial, out = p['initial'], np.zeros_like(v)
  names = ('mem',) if 'mem' in initial else ('mem_inner', 'mem_outer')
  for h in range(H):
    W0 = [initial[name][h] for name in names]
    D, S = ([np.zeros_like(w) for w in W0] for _ in range(2))
    W = W0
    for t in range(len(q)):
      written = gradients(W, k[t, h], v[t, h], identity)
      for i, (key, e) in enumerate(written):
        S[i] = beta[t, h] * S[i] - eta[t, h] * np.outer(e, key)
        D[i] = alpha[t, h] * D[i] + S[i]
      now = [w + d for w, d in zip(W0, D)]
      y = now[0] @ q[t, h]
      out[t, h] = (now[1] @ gelu(y) if now[1:] else y) + identity * q[t, h]
      if (start + t + 1) % 4 == 0:
        W = now
  return out


def titans_gates(p, x):
  eta, alpha, beta = (
    sigmoid(logit(p, x, name)) for name in ('rate', 'keep', 'carry')
  )
  return 0.5 / 4 * (1 - beta) * eta, alpha, beta


def titans_memory(p, x, start):
  q, k, v = (project(p, x, n) for n in ('query', 'key', 'value'))
  return regression(p, unit(q), unit(k), v, *titans_gates(p, x), start)


def titans(p, x, start):
  o = titans_memory(p, x, start)
  return from_heads(rms(o, p['norm']['scale']) * gate(p, x), p['out'])


def ttt(p, x, start):
  q, k, v = (project(p, x, n) for n in ('query', 'key', 'value'))
  eta = 0.5 / 4 * sigmoid(logit(p, x, 'rate'))
  one, none = np.ones_like(eta), np.zeros_like(eta)
  o = regression(p, unit(q), unit(k), v, eta, one, none, start, 1.0)
  return from_heads(rms(o, p['norm']['scale']) * gate(p, x), p['out'])


def heads(p, x_LxD, name):
  return np.einsum('ld,dhk->lhk', x_LxD, p[name]['kernel'])


def softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def attended(p, q, keys, values, h):
  """What one head reads: persistent tokens first, then (key, turned q) pairs.

  Args:
    p: parameters that hold the persistent tokens and the projections.
    q: `[K]`, before it is turned.
    keys: pairs of a query and a key, both turned.
    values: of the same tokens.
    h: the key-value head.
  """
  scores = [a @ b for a, b in keys]
  if 'persistent' in p:
    tokens = p['persistent']['tokens']
    scores = [*(heads(p, tokens, 'key')[:, h] @ q), *scores]
    values = [*heads(p, tokens, 'value')[:, h], *values]
  return softmax(np.array(scores) / np.sqrt(K)) @ np.array(values)


def window_attention(p, x_LxD, window):
  """Heads `[L, H, K]` of attention over the last `window` tokens."""
  q, k, v = (heads(p, x_LxD, n) for n in ('query', 'key', 'value'))
  turned_q, turned_k = rotated(q), rotated(k)
  out = np.zeros_like(q)
  for t, h in np.ndindex(out.shape[:2]):
    g = h * k.shape[1] // H
    seen = range(max(0, t - window + 1), t + 1)
    pairs = [(turned_q[t, h], turned_k[s, g]) for s in seen]
    out[t, h] = attended(p, q[t, h], pairs, [v[s, g] for s in seen], g)
  return out
