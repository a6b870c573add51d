"""Titans with attention and Samba, against plain loops over their equations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrence_cases as cases
from recurrence_cases import H, from_heads, heads, rms, rotated, unit

from nestax.models import block, linear_rnn, titans, titans_context
from nestax.models.config import ModelConfig

BESIDE = {'persistent': 3, 'window': 5}


def gated(p, y, m):
  y, m = rms(y, p['attention_norm']['scale']), rms(m, p['memory_norm']['scale'])
  return y * cases.sigmoid(m)


def as_gate(p, x, start):
  y = cases.window_attention(p['attention'], x, 5)
  m = cases.titans_memory(p['memory'], x, start)
  return from_heads(gated(p, y, m), p['out'])


def as_layer(p, x, start):
  m = cases.titans(p['memory'], x, start)
  seen = rms(x + m, p['attention_norm']['scale'])
  y = cases.window_attention(p['attention'], seen, 5)
  return m + from_heads(y, p['attention']['out'])


def as_context(p, x, start):
  """Segments of four tokens; `M'` the memory at a segment's start."""
  W0 = p['initial']['mem']
  M_start, M, S = W0, W0, np.zeros_like(W0)
  out, seen = [], []  # of the segment: key and value of each token, by head
  for t in range(len(x)):
    slot = (start + t) % 4
    token = x[t : t + 1]
    asked = unit(heads(p, token, 'memory_query'))[0]
    h = np.einsum('hij,hj->hi', M_start, asked)[None]
    h = from_heads(rms(h, p['recall_norm']['scale']), p['recall'])
    for one in (h, token):
      key = rotated(heads(p, one, 'key'), slot)[0]
      seen.append((key, heads(p, one, 'value')[0]))
    q = heads(p, token, 'query')
    turned = rotated(q, slot)[0]
    y = np.stack(
      [
        cases.attended(
          p,
          q[0, head],
          [(turned[head], key[head]) for key, _ in seen],
          [value[head] for _, value in seen],
          head,
        )
        for head in range(H)
      ]
    )[None]
    mixed = from_heads(y, p['mix'])
    eta, alpha, beta = (
      g[0][:, None, None] for g in cases.titans_gates(p, mixed)
    )
    q, k, v = (
      heads(p, mixed, f'memory_{n}')[0] for n in ('query', 'key', 'value')
    )
    k = unit(k)
    error = np.einsum('hij,hj->hi', M_start, k) - v
    S = beta * S - eta * error[:, :, None] * k[:, None, :]
    M = W0 + alpha * (M - W0) + S
    m = np.einsum('hij,hj->hi', M, unit(q))[None]
    out.append(from_heads(gated(p, y, m), p['out'])[0])
    if slot == 3:
      M_start, seen = M, []
  return np.array(out)


def test_memory_as_gate_is_its_equations():
  mixer = titans.MemoryAsGate(cases.config('titans_mag', **BESIDE))
  cases.assert_is_its_equations(mixer, as_gate)


def test_memory_as_layer_is_its_equations():
  mixer = titans.MemoryAsLayer(cases.config('titans_mal', G=1, **BESIDE))
  cases.assert_is_its_equations(mixer, as_layer)


def test_memory_as_context_is_its_equations():
  mixer = titans_context.MemoryAsContext(
    cases.config('titans_mac', persistent=3)
  )
  cases.assert_is_its_equations(mixer, as_context)


@pytest.mark.parametrize(
  'family, C, depth',
  [('titans', 64, 1), ('titans', 16, 2), ('titans_mac', 8, 1)],
)
def test_one_token_again_and_again_does_not_diverge(family, C, depth):
  memory = {'chunk_mem': C, 'chunk_rest': C, 'eta_max': 1.0 / depth}
  cfg = cases.config(family, memory=memory | {'depth_mem': depth})
  mixer, fresh = linear_rnn.LinearRNN(cfg), linear_rnn.init_state
  if family == 'titans_mac':
    mixer, fresh = (
      titans_context.MemoryAsContext(cfg),
      titans_context.init_state,
    )
  x = jnp.ones((1, 512, cases.D)) * jnp.linspace(-1, 1, cases.D)[None, None]
  boxed = jax.jit(mixer.init)(jax.random.key(0), None, x[:, :1])
  params = nn.unbox(boxed['params'])
  biases = [name for name in params['gates'] if name.endswith('_bias')]

  @jax.jit
  def written(carry):
    # rates at their greatest, nothing forgotten
    gates = dict.fromkeys(biases, jnp.full((cases.H,), 20.0))
    gates['carry_bias'] = jnp.full((cases.H,), carry)
    own = params | {'gates': params['gates'] | gates}
    state = mixer.apply({'params': own}, fresh(cfg, 1), x)[0]
    return jnp.abs(state.memory.running.stack).max()

  sizes = [float(written(carry)) for carry in (-20.0, 0.0, 1.5, 3.0, 6.0)]
  assert all(0.01 < size < 5.0 for size in sizes), sizes


def mlp(p, x):
  y = rms(x, p['norm']['scale'])
  return (cases.silu(y @ p['gate']) * (y @ p['up'])) @ p['down']


def samba(p, x, start):
  x = x + cases.mamba2(
    p['recurrence'], rms(x, p['recurrence_norm']['scale']), start
  )
  x = x + mlp(p['between'], x)
  y = cases.window_attention(p['mixer'], rms(x, p['mixer_norm']['scale']), 5)
  x = x + from_heads(y, p['mixer']['out'])
  return x + mlp(p['level_0'], x)


def test_a_block_of_samba_is_four_layers():
  one = block.Block(cases.config('samba', window=5, F=8))
  cases.assert_is_its_equations(one, samba)


def test_what_a_family_does_not_read_is_refused_in_words():
  def refused(family, words, **values):
    with pytest.raises(ValueError, match=words):
      ModelConfig.from_dict({'family': family} | values)

  refused('titans_mag', "window=0.*'titans_mag'.*at least 1")
  refused('samba', "window=0.*'samba'.*at least 1")
  refused('titans_mac', "window=8.*'titans_mac'.*leave it at 0", window=8)
  for key, value in (('stride', 2), ('implementation', 'scan'), ('remat', 0)):
    refused('titans_mac', f'memory.{key}={value!r}', memory={key: value})
  refused('deltanet', 'persistent=2', persistent=2)
  refused('transformer', 'persistent=2', persistent=2)
  refused('retnet', 'taps=3.*leave it at 4', taps=3)
  refused('mamba2', 'memory.depth_mem=2', memory={'depth_mem': 2})
  refused('ttt_linear', 'memory.anchor', memory={'anchor': 'zero'})
  refused('deltanet', 'memory.chunk_rest=32', memory={'chunk_rest': 32})
  refused('gated_deltanet', "cms.blocks='all'", cms={'blocks': 'all'})
  refused('retnet', 'head width 3.*even', D=6, H=2)
  ModelConfig.from_dict({'family': 'mamba2', 'D': 6, 'H': 2})
