"""The outer optimiser of a config: clipping, weight decay, one update rule."""

from typing import Any

import ml_collections
import optax

from nestax.optim import labels, schedules

NAMES = ('adamw',)
# Names, not ranks, decide: below `blocks` every array has an axis of layers.
RULES = (
  (r'(.*/)?kernel', 'matrix'),
  (r'(.*/)?embedding', 'embedding'),
  (r'(.*/)?(?!(kernel|embedding)$)[^/]+', 'vector'),
)


class OptimizerError(ValueError):
  """The config asks for an optimiser that cannot be built."""


def default_opt() -> dict[str, Any]:
  """Gives the `config.opt` group with its defaults, as a plain dict."""
  return {
    'lr': 3e-3,
    'warmup': 100,
    'final_lr_fraction': 0.1,
    'b1': 0.9,
    'b2': 0.95,
    'eps': 1e-8,
    'weight_decay': 0.1,
    'clip': 1.0,  # of the global norm of the gradient; 0 for none
  }


def build(
  config: ml_collections.ConfigDict, params: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Makes the transformation and the learning rate that a config names.

  Args:
    config: reads `optimizer`, the group `opt` and `train.steps`.
    params: parameters or their shapes, boxed with logical axes or not.

  Returns:
    The transformation, with clipping and weight decay inside, and the
    learning rate as a function of the step.

  Raises:
    OptimizerError, labels.LabelError, schedules.ScheduleError: in words.
  """
  opt = config.opt
  _check(config)
  schedule = schedules.warmup_cosine(
    opt.lr, opt.warmup, config.train.steps, opt.final_lr_fraction
  )
  clip = optax.clip_by_global_norm(opt.clip) if opt.clip else optax.identity()
  return optax.chain(clip, _adamw(opt, schedule, params)), schedule


def _check(config: ml_collections.ConfigDict) -> None:
  if config.optimizer not in NAMES:
    raise OptimizerError(
      f'optimizer is {config.optimizer!r}: it has to be one of '
      + ', '.join(NAMES)
    )
  for name in ('weight_decay', 'clip'):
    if config.opt[name] < 0:
      raise OptimizerError(
        f'opt.{name} is {config.opt[name]}: it has to be 0 or above'
      )


def _adamw(opt, schedule, params) -> optax.GradientTransformation:
  return optax.adamw(
    schedule,
    b1=opt.b1,
    b2=opt.b2,
    eps=opt.eps,
    weight_decay=opt.weight_decay,
    mask=labels.mask(params, RULES, 'matrix'),
  )
