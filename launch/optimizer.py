"""The outer optimiser of a config: clipping, weight decay, one update rule.

Matrices of the blocks take the rule that `config.optimizer` names; embeddings,
norms, gates and convolutions always take AdamW. Expert slots are frozen: they
are sleep's to train.
"""

from typing import Any

import flax.linen as nn
import jax
import ml_collections
import optax
from absl import logging

from nestax.launch import groups
from nestax.launch.groups import OptimizerError
from nestax.models import axes
from nestax.optim import (
  arguments,
  coefficients,
  frequency,
  labels,
  m3,
  schedules,
  timescales,
)
from nestax.optim.newton_schulz import Layout

NAMES = ('adamw', 'muon', 'm3')
NEWTON_SCHULZ = {
  'quintic': coefficients.quintic,
  'cubic': coefficients.cubic,
  'polar_express': coefficients.polar_express,
}


def default_opt() -> dict[str, Any]:
  """Gives the `config.opt` group with its defaults, as a plain dict."""
  return {
    'lr': 3e-3,
    'warmup': 100,
    'final_lr_fraction': 0.1,
    'weight_decay': 0.1,  # of matrices, times the learning rate
    'clip': 1.0,  # of the global norm of the gradient; 0 for none
    # Parameters that are not trained: a regular expression that their whole
    # path has to match, such as 'embed/.*|blocks/mixer/.*'; '' for none.
    'freeze': '',
    # Steps between two updates of level 0, 1, ..., with all gradients since
    # the last one (NL Eq. 71 on the axis of steps); () for every step.
    'level_every': (),
    # AdamW
    'b1': 0.9,
    'b2': 0.95,
    'eps': 1e-8,
    # Muon and M3, see optim/m3.py
    'momentum': 0.95,
    'nesterov': True,
    'ns': 'quintic',
    'ns_steps': 5,
    'consistent_rms': 0.2,  # AdamW's learning rates fit; 0 to scale by nothing
    # M3 alone
    'b3': 0.9,
    'every': 10,
    'alpha': 0.5,
    'second_moment': 0.0,  # factor of V; 0 to leave it out
    'accumulate': 'ema',
    'slow_dtype': 'float32',
  }


def build(
  config: ml_collections.ConfigDict,
  params: Any,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Makes the transformation and the learning rate that a config names.

  Args:
    config: reads `optimizer`, the group `opt` and `train.steps`.
    params: parameters or their shapes, boxed with logical axes or not; the
      transformation is for the unboxed ones.
    mesh: the devices over which matrices are laid to be orthogonalised; None
      leaves that to the partitioner.

  Returns:
    The transformation, with clipping and weight decay inside, and the
    learning rate as a function of the step.

  Raises:
    OptimizerError, labels.LabelError, schedules.ScheduleError, m3.M3Error:
      in words, if the numbers or the parameters do not fit.
  """
  opt = config.opt
  _check(config)
  schedule = schedules.warmup_cosine(
    opt.lr, opt.warmup, config.train.steps, opt.final_lr_fraction
  )
  params = nn.unbox(params)
  names = labels.label(params, groups.RULES)
  chosen = groups.choose(config, params)
  make = {
    groups.MATRIX: lambda schedule: _m3(config, schedule, names, mesh),
    groups.REST: lambda schedule: _adamw(opt, schedule, names),
    groups.FROZEN: lambda schedule: optax.set_to_zero(),
  }
  rules = {}
  for group in sorted(set(jax.tree.leaves(chosen))):
    kind, every = groups.parse(group)
    _warn_of_slow(config, kind, every)
    rules[group] = _at_frequency(make[kind], schedule, every)
  clip = optax.clip_by_global_norm(opt.clip) if opt.clip else optax.identity()
  if len(rules) == 1:
    return optax.chain(clip, *rules.values()), schedule
  return optax.chain(clip, optax.multi_transform(rules, chosen)), schedule


def _at_frequency(make, schedule, every: int) -> optax.GradientTransformation:
  if every == 1:
    return make(schedule)
  # schedules inside count updates, of which the n-th is at step n * every - 1
  tx = make(lambda count: schedule((count + 1) * every - 1))
  return frequency.at_frequency(tx, every)


def _adamw(opt, schedule, names) -> optax.GradientTransformation:
  decayed = jax.tree.map(lambda name: name in groups.MATRICES, names)
  return optax.chain(
    optax.scale_by_adam(opt.b1, opt.b2, opt.eps),
    _decay(opt, decayed),
    optax.scale_by_learning_rate(schedule),
  )


def _decay(opt, decayed) -> optax.GradientTransformation:
  # A function, since inside multi_transform some leaves are masked away.
  known = dict(zip(labels.paths(decayed), jax.tree.leaves(decayed)))

  def mask(params):
    return jax.tree_util.tree_map_with_path(
      lambda keys, _: known[labels.path_of(keys)], params
    )

  return optax.add_decayed_weights(opt.weight_decay, mask)


def _m3(config, schedule, names, mesh) -> optax.GradientTransformation:
  opt = config.opt
  slow, second = (), None
  if config.optimizer == 'm3':
    slow = (m3.TimeScale(opt.b3, opt.every, opt.alpha),)
    second = opt.second_moment or None
  layout = None
  if mesh is not None:
    layout = Layout(mesh, axes.RULES['embed'], axes.RULES['mlp'])
  return m3.m3(
    schedule,
    opt.momentum,
    second,
    slow,
    opt.weight_decay,
    accumulate=opt.accumulate if config.optimizer == 'm3' else 'ema',
    nesterov=opt.nesterov,
    coefficients=NEWTON_SCHULZ[opt.ns](opt.ns_steps),
    dimension_numbers=jax.tree.map(groups.MATRICES.get, names),
    consistent_rms=opt.consistent_rms or None,
    eps=opt.eps,
    slow_dtype=opt.slow_dtype,
    layout=layout,
  )


def _warn_of_slow(config, kind: str, every: int) -> None:
  """Says it if a run ends before M3's slow momentum has a say in it."""
  opt, updates = config.opt, config.train.steps // every
  if config.optimizer != 'm3' or kind != groups.MATRIX or not opt.alpha:
    return
  if opt.every >= updates:
    logging.warning(
      'the slow momentum of M3 acts from update %d on (opt.every), but there '
      'are %d (train.steps%s): until then M3 is Muon in shorter steps; lower '
      'opt.every or take optimizer=muon',
      opt.every + 1,
      updates,
      f', one in {every}' if every > 1 else '',
    )


def _check(config: ml_collections.ConfigDict) -> None:
  opt = config.opt
  for name, value, known in (
    ('optimizer', config.optimizer, NAMES),
    ('opt.ns', opt.ns, tuple(NEWTON_SCHULZ)),
    ('opt.slow_dtype', opt.slow_dtype, arguments.FLOATS),
    ('opt.accumulate', opt.accumulate, m3.ACCUMULATE),
  ):
    arguments.one_of(OptimizerError, name, value, known)
  arguments.whole(OptimizerError, 'opt.every', opt.every)
  for name in ('weight_decay', 'clip', 'alpha', 'consistent_rms'):
    arguments.within(OptimizerError, f'opt.{name}', opt[name])
  arguments.within(OptimizerError, 'opt.eps', opt.eps, low_open=True)
  for name in ('b1', 'b2'):
    arguments.within(OptimizerError, f'opt.{name}', opt[name], 0, 1)
  ema = opt.accumulate == 'ema' or config.optimizer == 'muon'
  for name in ('momentum', 'b3', 'second_moment'):
    timescales.factor(OptimizerError, f'opt.{name}', opt[name], ema)
  for level, every in enumerate(opt.level_every):
    if isinstance(every, int) and every > config.train.steps:
      raise OptimizerError(
        f'opt.level_every is {tuple(opt.level_every)}: level {level} would '
        f'never be updated in {config.train.steps} steps (train.steps); '
        'freeze it by opt.freeze if that is meant'
      )
