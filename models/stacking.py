"""Ad-hoc level stacking: a trained Transformer whose MLPs learn as they read.

NL section 7.3: the MLPs of a trained network become the initial values of
levels. By groups, the blocks that learn are shared out among the periods,
the first blocks fastest, and each MLP is one level. By copies, every MLP is
the initial value of as many levels as there are periods, side by side with
equal weights, so that their sum is the MLP. At rate 0 both give the logits of
the original.
"""

import dataclasses

import jax.numpy as jnp

from nestax.models import border
from nestax.models.config import ModelConfig
from nestax.models.continuum import CMSConfig

HOW = ('groups', 'copies')


def stack(cfg: ModelConfig, params, how: str, cms: CMSConfig):
  """Makes a Hope-Attention model of a Transformer.

  Args:
    cfg: of family 'transformer'.
    params: its parameters.
    how: 'groups' or 'copies'.
    cms: periods, blocks, rate and the rest; `assign`, `width`, `variant` and
      `mix` follow from `how`.

  Returns:
    (ModelConfig, params); arrays are shared with the original.

  Raises:
    ValueError: for a model of another family or an unknown way.
  """
  if cfg.family != 'transformer':
    raise ValueError(
      f'family={cfg.family!r}: only the MLPs of a transformer can be stacked'
    )
  if how not in HOW:
    raise ValueError(f'how={how!r}: one of {HOW}')
  border.bare(params)
  if how == 'groups':
    cms = dataclasses.replace(cms, assign='groups', variant='sequential')
  else:
    k = len(cms.periods)
    cms = dataclasses.replace(
      cms, assign='chain', width='full', variant='independent', mix=1 / k
    )
  new = dataclasses.replace(cfg, family='hope_attention', cms=cms)
  return new, _params(new, params, how)


def _params(cfg: ModelConfig, params, how: str):
  params = dict(params)
  levels = len(cfg.schedule.levels)
  if how == 'copies':
    blocks = dict(params['blocks'])
    for i in range(levels):
      blocks[f'level_{i}'] = blocks['level_0']
    blocks['mix'] = jnp.full((cfg.N, levels), 1 / levels, jnp.float32)
    params['blocks'] = blocks
  if cfg.stream:
    log_rate = jnp.log(jnp.maximum(cfg.cms.rate, 1e-30))
    shape = (len(cfg.adapting), levels)
    params['log_rate'] = jnp.full(shape, log_rate, jnp.float32)
  return params
