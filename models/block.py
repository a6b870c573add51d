"""One block: a mixer, then a continuum of levels, all `(state, x) -> ...`."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestax.cms import level as levels
from nestax.models import attention, axes, hope
from nestax.models.config import ModelConfig
from nestax.models.layers import RMSNorm


class BlockState(NamedTuple):
  """Everything per sequence that one block carries."""

  mixer: hope.TitanState | attention.AttentionState


def init_state(cfg: ModelConfig, B: int, length: int) -> BlockState:
  """Fresh sequences; `length` is the capacity of an attention cache."""
  if cfg.family == 'hope':
    return BlockState(hope.init_state(cfg, B))
  return BlockState(attention.init_state(cfg, B, length))


class Level(nn.Module):
  """One level of the continuum: a pre-norm residual MLP of hidden width F.

  Its weights here are the slow `theta_0`; what a level learns inside a
  sequence is a delta on them, which is zero for an ordinary MLP.
  """

  cfg: ModelConfig
  F: int

  @nn.compact
  def __call__(self, x_BxLxD):
    cfg, F, D = self.cfg, self.F, self.cfg.D

    def kernel(name, shape, names, std):
      init = nn.initializers.normal(std)
      return self.param(
        name, nn.with_logical_partitioning(init, names), shape, jnp.float32
      )

    theta = levels.Theta(
      kernel('gate', (D, F), ('embed', 'mlp'), D**-0.5),
      kernel('up', (D, F), ('embed', 'mlp'), D**-0.5),
      kernel('down', (F, D), ('mlp', 'embed'), (2 * cfg.N * F) ** -0.5),
    )
    norm = RMSNorm(
      (D,),
      ('activation',),
      dtype=cfg.compute_dtype,
      epsilon=cfg.epsilon,
      name='norm',
    )
    return x_BxLxD + levels.read(theta, norm(x_BxLxD), cfg.compute_dtype)


class Block(nn.Module):
  """`(state, x_BxLxD, reset_BxL) -> (state, x_BxLxD)`; state may be None."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, state, x_BxLxD, reset_BxL=None):
    cfg = self.cfg
    hopes = cfg.family == 'hope'
    mixer = (hope.SelfModifyingTitan if hopes else attention.Attention)(
      cfg, name='mixer'
    )
    norm = RMSNorm(
      (cfg.D,),
      ('activation',),
      dtype=cfg.compute_dtype,
      epsilon=cfg.epsilon,
      name='mixer_norm',
    )
    inner = None if state is None else state.mixer
    inner, y_BxLxD = mixer(inner, norm(x_BxLxD), reset_BxL)
    x_BxLxD = axes.constrain(x_BxLxD + y_BxLxD, 'batch', 'length', 'activation')
    for i, level in enumerate(cfg.schedule.levels):
      x_BxLxD = Level(cfg, level.F, name=f'level_{i}')(x_BxLxD)
    x_BxLxD = axes.constrain(x_BxLxD, 'batch', 'length', 'activation')
    return None if state is None else BlockState(inner), x_BxLxD


def remat(block, policy: str):
  """Wraps the block class so that its backward pass recomputes, or does not."""
  if policy == 'none':
    return block
  keep = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  }[policy]
  return nn.remat(block, policy=keep, prevent_cse=False)
