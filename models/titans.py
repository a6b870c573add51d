"""Titans with attention: memory as gate and as layer (2501.00663, section 4).

`M` is the neural memory of `linear_rnn`, `p` the persistent tokens, `N` a
learned norm, and `y (x) m = N(y) sigmoid(N(m))` the gating.

  MAG   y = window attention over p, x;  m = M(x);  o = y (x) m
  MAL   y = x + M(x);  o = M(x) + window attention over p, N(y)

The third, memory as context, is in `titans_context`.

Deviations. The memory does not read p: its learned first value is what it knows
beforehand. MAL has a residual around the memory as around the attention, as the
paper says of all its blocks.
"""

from typing import NamedTuple

import flax.linen as nn
import jax

from nestax.models import attention, linear_rnn
from nestax.models.config import ModelConfig
from nestax.models.layers import Linear, RMSNorm


class BothState(NamedTuple):
  """What a memory and an attention beside each other carry."""

  memory: linear_rnn.LinearState
  attention: attention.AttentionState

  @staticmethod
  def axes():
    """The names of every leaf's axes."""
    return BothState(
      linear_rnn.LinearState.axes(), attention.AttentionState.axes()
    )


def init_both(cfg: ModelConfig, B: int, length: int, whole: bool) -> BothState:
  """Fresh sequences; `length` and `whole` are those of an attention cache."""
  return BothState(
    linear_rnn.init_state(cfg, B),
    attention.init_state(cfg, B, length, whole),
  )


def norm(cfg: ModelConfig, name: str, heads: bool = True) -> RMSNorm:
  shape, names = ((cfg.D,), ('activation',))
  if heads:
    shape, names = (cfg.H, cfg.head_width), ('heads', 'head_dim')
  return RMSNorm(
    shape, names, dtype=cfg.compute_dtype, epsilon=cfg.epsilon, name=name
  )


def from_heads(cfg: ModelConfig, name: str, gain: float) -> Linear:
  return Linear(
    'blhk,hkd->bld',
    (cfg.H, cfg.head_width, cfg.D),
    ('heads', 'head_dim', 'embed'),
    cfg.H * cfg.head_width,
    gain=gain,
    dtype=cfg.compute_dtype,
    name=name,
  )


class MemoryAsGate(nn.Module):
  """MAG: `(state, x_BxLxD, reset_BxL) -> (state, y_BxLxD)`."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self, state, x_BxLxD, reset_BxL=None, length_B=None, aligned=False
  ):
    cfg = self.cfg
    memory, attended = state or (None, None)
    options = (reset_BxL, length_B, aligned)
    look = attention.Attention(cfg, bare=True, name='attention')
    attended, y_BxLxHxK = look(attended, x_BxLxD, *options)
    remember = linear_rnn.LinearRNN(cfg, bare=True, name='memory')
    memory, m_BxLxHxK = remember(memory, x_BxLxD, *options)
    gate = jax.nn.sigmoid(norm(cfg, 'memory_norm')(m_BxLxHxK))
    y_BxLxHxK = norm(cfg, 'attention_norm')(y_BxLxHxK) * gate
    out = from_heads(cfg, 'out', (2 * cfg.N) ** -0.5)
    return state and BothState(memory, attended), out(y_BxLxHxK)


class MemoryAsLayer(nn.Module):
  """MAL: `(state, x_BxLxD, reset_BxL) -> (state, y_BxLxD)`."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self, state, x_BxLxD, reset_BxL=None, length_B=None, aligned=False
  ):
    cfg = self.cfg
    memory, attended = state or (None, None)
    options = (reset_BxL, length_B, aligned)
    remember = linear_rnn.LinearRNN(cfg, name='memory')
    memory, m_BxLxD = remember(memory, x_BxLxD, *options)
    seen_BxLxD = norm(cfg, 'attention_norm', heads=False)(x_BxLxD + m_BxLxD)
    look = attention.Attention(cfg, name='attention')
    attended, y_BxLxD = look(attended, seen_BxLxD, *options)
    return state and BothState(memory, attended), m_BxLxD + y_BxLxD
