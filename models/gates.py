"""Gates of the linear recurrences, each in the form of its paper.

With `w x` a map of the token to one number a head and `c` a bias:

  deltanet         eta = sigmoid(w x)
  gated_deltanet   alpha = exp(-exp(A) softplus(w x + c)),
                   eta = alpha sigmoid(w x)
  retnet           alpha = 1 - 2^(-5 - head), eta = 1
  mamba2, samba    eta = softplus(w x + c), alpha = exp(-exp(A) eta)
  titans           alpha and beta sigmoids of their own maps (Titans' 1 - alpha
                   and eta), theta there:
                   eta = (1 - beta) eta_max sigmoid(w x + c) / chunk_mem
  ttt              eta = eta_max sigmoid(w x + c) / chunk_mem

Titans and TTT have no decay along the key: all tokens of a chunk step from its
start, and momentum carries a step on to 1 / (1 - beta) of itself. Where the
keys of a chunk are alike, that comes to chunk_mem eta / (1 - beta) errors, and
beyond 2, with momentum sooner, chunks overshoot by more than they correct. So
here `eta_max` bounds what the steps of a chunk come to together: up to 1 no
size of chunk and no constant gates diverge (of two layers, up to half of that).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestax.models.config import ModelConfig
from nestax.models.layers import Linear
from nestax.models.memory.decay import LEAST_LOG

# Titans' gates begin nearly constant: at half the greatest rate, alpha =
# sigmoid(5) = 0.993, beta = sigmoid(0) = 0.5.
GAIN = 0.1
BIAS = {'rate': 0.0, 'keep': 5.0, 'carry': 0.0}


class Gates(NamedTuple):
  """Of each token and head, `[B, L, H]` float32; None where there is none."""

  eta: jax.Array
  log_alpha: jax.Array | None = None
  log_beta: jax.Array | None = None


def _log_uniform(low: float, high: float):
  """First logarithms of numbers from `low` to `high`, log-uniform."""

  def init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, np.log(low), np.log(high))

  return init


def _steps(key, shape, dtype):
  """Biases whose softplus is from 0.001 to 0.1, log-uniform."""
  step = jnp.exp(_log_uniform(1e-3, 1e-1)(key, shape, dtype))
  return step + jnp.log(-jnp.expm1(-step))


class GateMaps(nn.Module):
  """`x_BxLxD -> Gates`, in the form of the family."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BxLxD) -> Gates:
    family = self.cfg.family
    if family == 'retnet':
      return self._fixed(x_BxLxD)
    if family in ('mamba2', 'samba'):
      step = jax.nn.softplus(self._logit(x_BxLxD, 'step', _steps))
      return Gates(step, -self._rate() * step)
    if family.startswith('titans'):
      rate, keep, carry = (self._near(x_BxLxD, name) for name in BIAS)
      # 1 - beta as a sigmoid: exact where beta is near 1
      eta = self._share(rate) * jax.nn.sigmoid(-carry)
      return Gates(eta, jax.nn.log_sigmoid(keep), jax.nn.log_sigmoid(carry))
    if family.startswith('ttt'):
      zero = nn.initializers.zeros
      return Gates(self._share(self._logit(x_BxLxD, 'rate', zero)))
    beta = jax.nn.sigmoid(self._logit(x_BxLxD, 'write'))
    if family == 'deltanet':
      return Gates(beta)
    step = jax.nn.softplus(self._logit(x_BxLxD, 'step', _steps))
    # bounded, since the value is divided by alpha
    log_alpha = jnp.maximum(-self._rate() * step, LEAST_LOG)
    # alpha (I - beta k k^T) is alpha I - eta k k^T
    return Gates(beta * jnp.exp(log_alpha), log_alpha)

  def _fixed(self, x_BxLxD) -> Gates:
    shape = (*x_BxLxD.shape[:2], self.cfg.H)
    log_alpha_H = np.log1p(-(2.0 ** (-5.0 - np.arange(self.cfg.H))))
    log_alpha = jnp.asarray(log_alpha_H, jnp.float32)[None, None]
    return Gates(
      jnp.ones(shape, jnp.float32), jnp.broadcast_to(log_alpha, shape)
    )

  def _share(self, logit_BxLxH):
    """A token's part of its chunk's step, which is at most `eta_max`."""
    rule = self.cfg.rule
    return jax.nn.sigmoid(logit_BxLxH) * (rule.eta_max / rule.chunk_mem)

  def _near(self, x_BxLxD, name: str):
    """A logit that begins near its first bias."""
    bias = nn.initializers.constant(BIAS[name])
    return self._logit(x_BxLxD, name, bias, GAIN)

  def _logit(self, x_BxLxD, name: str, bias=None, gain: float = 1.0):
    cfg = self.cfg
    names = ('embed', 'heads')
    logit_BxLxH = Linear(
      'bld,dh->blh', (cfg.D, cfg.H), names, cfg.D, gain, name=name
    )(x_BxLxD)
    if bias is None:
      return logit_BxLxH
    return logit_BxLxH + self._per_head(f'{name}_bias', bias)

  def _rate(self):
    return jnp.exp(self._per_head('log_rate', _log_uniform(1.0, 16.0)))

  def _per_head(self, name: str, init):
    init = nn.with_logical_partitioning(init, ('heads',))
    return self.param(name, init, (self.cfg.H,), jnp.float32)[None, None]
