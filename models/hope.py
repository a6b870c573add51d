"""The self-modifying Titan as a block's mixer (NL Eq. 83-94)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestax.models import axes, recurrence
from nestax.models.config import ModelConfig
from nestax.models.layers import CausalConv, Linear, RMSNorm, segment_starts
from nestax.models.memory.types import Inputs, MemoryState
from nestax.models.memory.types import init_state as init_memory

# First standard deviation of the maps, in units of fan_in ** -0.5: small, so
# that k and v begin near their slow projections and `mem` with what it writes.
GAIN = 0.1
# First values of the other gates' biases (eta's is `MemoryConfig.eta_bias`):
# alpha = sigmoid(5) = 0.993; beta = sigmoid(0) = 0.5.
BIAS = {'alpha': 5.0, 'beta': 0.0}


class TitanState(NamedTuple):
  """What one self-modifying Titan carries from token to token, float32."""

  memory: MemoryState
  tails: tuple[jax.Array, ...]  # last inputs of the convolutions q, k, v

  @staticmethod
  def axes():
    """The names of every leaf's axes."""
    tail = ('batch', 'taps', 'heads', 'head_dim')
    return TitanState(recurrence.STATE, (tail,) * 3)


def init_state(cfg: ModelConfig, B: int) -> TitanState:
  """An empty memory for each of B sequences."""
  tail = jnp.zeros((B, cfg.taps - 1, cfg.H, cfg.head_width), jnp.float32)
  memory = init_memory(cfg.memory, B, cfg.H, cfg.head_width)
  return TitanState(memory, (tail,) * 3)


class InitialValues(nn.Module):
  """The memories' slow initial values `M_0`, meta-learned by the outer loop.

  Returns box -> weights with a leading axis of heads, as
  `memory.types.stack_initial` takes them.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(self):
    cfg, rule = self.cfg, self.cfg.rule
    H, K = cfg.H, cfg.head_width
    F = K * rule.expansion

    def param(name, shape, fan_in, gain=1.0):
      init = nn.initializers.normal(gain * fan_in**-0.5)
      names = ('heads', 'memory_rows', 'memory')
      names = names if len(shape) == 3 else ('heads', 'memory')
      return self.param(
        name, nn.with_logical_partitioning(init, names), shape, jnp.float32
      )

    initial = {}
    for box in rule.boxes:
      if box in rule.deep:
        initial[box] = {
          'inner': param(f'{box}_inner', (H, F, K), K),
          'outer': param(f'{box}_outer', (H, K, F), F, GAIN),
        }
      else:
        initial[box] = {'kernel': param(box, (H, K, K), K, GAIN)}
    eta_H = rule.eta_bias - np.linspace(0.0, rule.eta_spread, H)
    for gate, first in (('eta', eta_H), ('alpha', BIAS['alpha'])):
      if gate in rule.given or (rule.given and not rule.retention):
        continue  # handed in, or not there
      bias = nn.with_logical_partitioning(
        nn.initializers.constant(first), ('heads',)
      )
      initial[gate] = {
        'kernel': param(gate, (H, K), K, GAIN),
        'bias': self.param(f'{gate}_bias', bias, (H,), jnp.float32),
      }
    return initial


class SelfModifyingTitan(nn.Module):
  """`(state, x_BxLxD, reset_BxL) -> (state, y_BxLxD)`.

  `length_B` and `aligned` are those of `memory.api.run`.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self, state, x_BxLxD, reset_BxL=None, length_B=None, aligned=False
  ):
    cfg = self.cfg
    H, K, D = cfg.H, cfg.head_width, cfg.D
    dtype = cfg.compute_dtype
    start_BxL = None if reset_BxL is None else segment_starts(reset_BxL)

    def linear(name):
      names = ('embed', 'heads', 'head_dim')
      return Linear(
        'bld,dhk->blhk', (D, H, K), names, D, dtype=dtype, name=name
      )(x_BxLxD)

    tails = (state or init_state(cfg, x_BxLxD.shape[0])).tails
    mixed, new_tails = [], []
    for name, tail in zip(('query', 'key', 'value'), tails):
      conv = CausalConv((H, K), cfg.taps, dtype, name=f'{name}_conv')
      tail, y_BxLxHxK = conv(tail, linear(name), start_BxL, length_B)
      mixed.append(jax.nn.silu(y_BxLxHxK))
      new_tails.append(tail)
    query, key, value = (
      axes.constrain(y, 'batch', 'length', 'heads', None) for y in mixed
    )
    inputs = Inputs(query, key, value, self._log_beta(key), reset_BxL)
    initial = InitialValues(cfg, name='initial')()
    memory, o_BxLxHxK = recurrence.run(
      cfg.memory,
      initial,
      None if state is None else state.memory,
      inputs,
      dtype=dtype,
      implementation=cfg.memory.implementation or None,
      length_B=length_B,
      aligned=aligned,
    )
    o_BxLxHxK = axes.constrain(o_BxLxHxK, 'batch', 'length', 'heads', None)
    state = None if state is None else TitanState(memory, tuple(new_tails))
    norm = RMSNorm(
      (H, K),
      ('heads', 'head_dim'),
      dtype=dtype,
      epsilon=cfg.epsilon,
      name='norm',
    )
    y_BxLxHxK = norm(o_BxLxHxK) * jax.nn.silu(linear('gate'))
    out = Linear(
      'blhk,hkd->bld',
      (H, K, D),
      ('heads', 'head_dim', 'embed'),
      H * K,
      gain=(2 * cfg.N) ** -0.5,
      dtype=dtype,
      name='out',
    )
    return state, out(y_BxLxHxK)

  def _log_beta(self, key_BxLxHxK):
    """The slow momentum gate of each token and head, as a logarithm."""
    if not self.cfg.memory.momentum:
      return None
    H, K = self.cfg.H, self.cfg.head_width
    kernel = self.param(
      'beta',
      nn.with_logical_partitioning(
        nn.initializers.normal(GAIN * K**-0.5), ('heads', 'memory')
      ),
      (H, K),
      jnp.float32,
    )
    bias = self.param(
      'beta_bias',
      nn.with_logical_partitioning(
        nn.initializers.constant(BIAS['beta']), ('heads',)
      ),
      (H,),
      jnp.float32,
    )
    key_BxLxHxK = key_BxLxHxK.astype(jnp.float32)
    logit = jnp.einsum('blhk,hk->blh', key_BxLxHxK, kernel, precision='highest')
    return jax.nn.log_sigmoid(logit + bias[None, None])
