"""Linear recurrences as mixers: the memory with parts left out, other gates.

With `q, k, v` of each token and head (after convolutions of width `taps` and
SiLU, but in RetNet), `D` the memory and `o = D q`; the gates are in `gates`:

  deltanet         D = D (I - b k k^T) + b v k^T              arXiv 2406.06484
    q, k of unit norm; y = norm(o)
  gated_deltanet   D = a D (I - b k k^T) + b v k^T            arXiv 2412.06464
    q, k of unit norm; y = norm(o) silu(g)
  retnet           D = a D + v k^T                            arXiv 2307.08621
    q, k rotated, k / sqrt(K); y = norm(o) silu(g)
  mamba2           D = a D + eta v k^T                        arXiv 2405.21060
    y = norm((o + s v) silu(g)) over all heads; k, q, v are its B, C, x
  titans           S = beta S - eta (M'(k) - v) k^T,          arXiv 2501.00663
                   D = alpha D + S
    q, k of unit norm; `M'` the map at the chunk's start, of one layer or two,
    from a learned first value; y = norm(o) silu(g)
  ttt              D = D - eta (M'(k) - v) k^T                arXiv 2407.04620
    the same without forgetting and momentum; `M(z) = z + W z`, or two layers

Deviations: values are as wide as keys, and every block has an MLP, as in all
families here. Mamba-2's B and C belong to one head each (its multi-head
pattern). Two-layer maps are written layer by layer with unit keys (see
`memory.token`). Retention leaves a learned first value whole unless
`memory.anchor='zero'`. TTT's inner map has no layer norm and no bias, its keys
have unit norm, and the mean over its mini-batch, a chunk, replaces the sum.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestax.models import axes, recurrence
from nestax.models.config import ModelConfig
from nestax.models.families import FAMILY
from nestax.models.gates import GateMaps
from nestax.models.hope import InitialValues
from nestax.models.layers import (
  CausalConv,
  Linear,
  RMSNorm,
  rotary,
  segment_starts,
)
from nestax.models.memory.types import Inputs, MemoryState
from nestax.models.memory.types import init_state as init_memory


class LinearState(NamedTuple):
  """What one linear recurrence carries from token to token."""

  memory: MemoryState
  tails: tuple[jax.Array, ...]  # last inputs of the convolutions q, k, v
  clock_B: jax.Array  # int32, tokens read

  @staticmethod
  def axes():
    """The names of every leaf's axes."""
    tail = ('batch', 'taps', 'heads', 'head_dim')
    return LinearState(recurrence.STATE, tail, ('batch',))


def init_state(cfg: ModelConfig, B: int) -> LinearState:
  """An empty memory for each of B sequences."""
  tail = jnp.zeros((B, cfg.taps - 1, cfg.H, cfg.head_width), jnp.float32)
  return LinearState(
    init_memory(cfg.rule, B, cfg.H, cfg.head_width),
    () if cfg.family == 'retnet' else (tail,) * 3,
    jnp.zeros((B,), jnp.int32),
  )


class LinearRNN(nn.Module):
  """`(state, x_BxLxD, reset_BxL) -> (state, y_BxLxD)`.

  `length_B` and `aligned` are those of `memory.api.run`. If `bare`, the
  memory's own output `[B, L, H, K]`, float32, comes back for y.
  """

  cfg: ModelConfig
  bare: bool = False

  @nn.compact
  def __call__(
    self, state, x_BxLxD, reset_BxL=None, length_B=None, aligned=False
  ):
    cfg = self.cfg
    before = state or init_state(cfg, x_BxLxD.shape[0])
    tails, (query, key, value) = self._inputs(
      before, x_BxLxD, reset_BxL, length_B
    )
    gates = GateMaps(cfg, name='gates')(x_BxLxD)
    written = value
    if cfg.family == 'gated_deltanet':
      # eta v = alpha beta v is written, where beta v is wanted
      written = value * jnp.exp(-gates.log_alpha)[..., None]
    inputs = Inputs(
      query, key, written, gates.log_beta, reset_BxL, gates.eta, gates.log_alpha
    )
    memory, o_BxLxHxK = recurrence.run(
      cfg.rule,
      self._initial(),
      None if state is None else state.memory,
      inputs,
      dtype=cfg.compute_dtype,
      implementation=cfg.memory.implementation or None,
      length_B=length_B,
      aligned=aligned,
    )
    if state is not None:
      read = x_BxLxD.shape[1] if length_B is None else length_B
      state = LinearState(memory, tails, state.clock_B + read)
    o_BxLxHxK = axes.constrain(o_BxLxHxK, 'batch', 'length', 'heads', None)
    if self.bare:
      return state, o_BxLxHxK
    return state, self._out(self._gated(x_BxLxD, o_BxLxHxK, value))

  def _initial(self):
    """The memory's first value: learned, or zero."""
    if FAMILY[self.cfg.family].initial:
      return InitialValues(self.cfg, name='initial')()
    H, K = self.cfg.H, self.cfg.head_width
    return {'mem': {'kernel': jnp.zeros((H, K, K), jnp.float32)}}

  def _linear(self, name, x_BxLxD):
    cfg = self.cfg
    return Linear(
      'bld,dhk->blhk',
      (cfg.D, cfg.H, cfg.head_width),
      ('embed', 'heads', 'head_dim'),
      cfg.D,
      dtype=cfg.compute_dtype,
      name=name,
    )(x_BxLxD)

  def _inputs(self, state: LinearState, x_BxLxD, reset_BxL, length_B):
    """(tails, (query, key, value)), the latter as the memory reads them."""
    cfg = self.cfg
    q, k, v = (self._linear(n, x_BxLxD) for n in ('query', 'key', 'value'))
    if cfg.family == 'retnet':
      index_1xL = jnp.arange(x_BxLxD.shape[1], dtype=jnp.int32)[None]
      position_BxL = state.clock_B[:, None] + index_1xL
      q, k = (rotary(x, position_BxL, cfg.rope_base) for x in (q, k))
      return (), (q, k * cfg.head_width**-0.5, v)
    start_BxL = None if reset_BxL is None else segment_starts(reset_BxL)
    tails, mixed = [], []
    for name, tail, x in zip(('query', 'key', 'value'), state.tails, (q, k, v)):
      conv = CausalConv(
        x.shape[2:], cfg.taps, cfg.compute_dtype, name=f'{name}_conv'
      )
      tail, y = conv(tail, x, start_BxL, length_B)
      tails.append(tail)
      mixed.append(
        axes.constrain(jax.nn.silu(y), 'batch', 'length', 'heads', None)
      )
    return tuple(tails), tuple(mixed)

  def _gated(self, x_BxLxD, o_BxLxHxK, value_BxLxHxK):
    """The memory's output, normalised and gated as the family does."""
    cfg = self.cfg
    H, K = cfg.H, cfg.head_width
    options = {'dtype': cfg.compute_dtype, 'epsilon': cfg.epsilon}
    if cfg.family in ('mamba2', 'samba'):
      skip_H = self.param(
        'skip',
        nn.with_logical_partitioning(nn.initializers.ones, ('heads',)),
        (H,),
        jnp.float32,
      )
      y = o_BxLxHxK + skip_H[None, None, :, None] * value_BxLxHxK
      y = y * jax.nn.silu(self._linear('gate', x_BxLxD))
      y_BxLxHK = y.reshape(*y.shape[:2], H * K)
      norm = RMSNorm((H * K,), ('heads',), name='norm', **options)
      return norm(y_BxLxHK).reshape(y.shape)
    norm = RMSNorm((H, K), ('heads', 'head_dim'), name='norm', **options)
    if cfg.family == 'deltanet':
      return norm(o_BxLxHxK)
    return norm(o_BxLxHxK) * jax.nn.silu(self._linear('gate', x_BxLxD))

  def _out(self, y_BxLxHxK):
    cfg = self.cfg
    return Linear(
      'blhk,hkd->bld',
      (cfg.H, cfg.head_width, cfg.D),
      ('heads', 'head_dim', 'embed'),
      cfg.H * cfg.head_width,
      gain=(2 * cfg.N) ** -0.5,
      dtype=cfg.compute_dtype,
      name='out',
    )(y_BxLxHxK)
