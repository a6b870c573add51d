"""Which parameters share an update rule, and how often it is due."""

import re
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from nestax.optim import labels, matrices

MATRIX, REST, FROZEN = 'matrix', 'rest', 'frozen'
# Which axes of a label's arrays are (in, out); all under `blocks` have an axis
# of layers first, and every head's memory is a matrix of its own.
MATRICES = {
  'level': matrices.MuonDimensionNumbers(1, 2),
  'to_heads': matrices.MuonDimensionNumbers(1, (2, 3)),
  'from_heads': matrices.MuonDimensionNumbers((1, 2), 3),
  'memory': matrices.MuonDimensionNumbers(3, 2),
}
MIXER = r'blocks/(mixer|recurrence)/((attention|memory)/)?'
RULES = (
  (r'blocks/(level_\d+|between)/(gate|up|down)', 'level'),
  (MIXER + r'(memory_)?(query|key|value|gate)/kernel', 'to_heads'),
  (MIXER + r'(out|mix|recall)/kernel', 'from_heads'),
  (MIXER + r'initial/(q|k|v|mem)(_inner|_outer)?', 'memory'),
  (MIXER + r'(query|key|value)_conv/kernel', 'convolution'),
  (MIXER + r'(beta|initial/(eta|alpha))(_bias)?', 'gate'),
  (MIXER + r'(gates/.*|skip)', 'gate'),
  (MIXER + r'persistent/tokens', 'embedding'),
  (r'(blocks/.*|final_)norm/scale', 'norm'),
  (r'log_rate|blocks/mix|blocks/level_\d+/value', 'continuum'),
  (r'embed/embedding|head', 'embedding'),
  (r'blocks/level_\d+/slots/(a|b|logit|active)', 'slot'),
)
# All of a level, its norm and the rest included.
LEVEL = re.compile(r'blocks/level_(\d+)/.*')


class OptimizerError(ValueError):
  """The config asks for an optimiser that cannot be built."""


def choose(config: ml_collections.ConfigDict, params: Any) -> Any:
  """Gives every parameter the name of its group, as `parse` takes it.

  Args:
    config: reads `optimizer`, `opt.freeze` and `opt.level_every`.
    params: parameters or their shapes, unboxed.

  Raises:
    OptimizerError, labels.LabelError: in words, see `frozen`.
  """

  def one(name: str, still: bool, every: int) -> str:
    if still:
      return FROZEN
    matrix = name in MATRICES and config.optimizer != 'adamw'
    kind = MATRIX if matrix else REST
    return kind if every == 1 else f'{kind} every {every}'

  return jax.tree.map(
    one,
    labels.label(params, RULES),
    frozen(config, params),
    _steps_between(config.opt.level_every, params),
  )


def parse(group: str) -> tuple[str, int]:
  """Kind of a group, and steps between two of its updates."""
  kind, _, every = group.partition(' every ')
  return kind, int(every or 1)


def frozen(config: ml_collections.ConfigDict, params: Any) -> Any:
  """Says of every parameter whether it is not trained.

  Args:
    config: reads `opt.freeze`; expert slots are always frozen.
    params: parameters or their shapes, boxed or not.

  Returns:
    A pytree of bools like the unboxed parameters.

  Raises:
    OptimizerError: for an expression that is none, that matches no parameter
      or that leaves none to train.
  """
  params, words = nn.unbox(params), config.opt.freeze
  try:
    rule = re.compile(words)
  except re.error as error:
    raise OptimizerError(f'opt.freeze is {words!r}: {error}') from error
  paths = labels.paths(params)
  if words and not any(map(rule.fullmatch, paths)):
    raise OptimizerError(
      f'opt.freeze is {words!r}: it matches none of ' + ', '.join(paths)
    )
  found = jax.tree_util.tree_map_with_path(
    lambda keys, name: (
      name == 'slot' or bool(rule.fullmatch(labels.path_of(keys)))
    ),
    labels.label(params, RULES),
  )
  if all(jax.tree.leaves(found)):
    raise OptimizerError(f'opt.freeze is {words!r}: nothing is left to train')
  return found


def _steps_between(level_every, params) -> Any:
  """Steps between two updates of every parameter."""
  levels = [
    int(m[1]) for p in labels.paths(params) if (m := LEVEL.fullmatch(p))
  ]
  most = max(levels, default=-1) + 1
  if len(level_every) > most or not all(
    isinstance(n, int) and n >= 1 for n in level_every
  ):
    raise OptimizerError(
      f'opt.level_every is {tuple(level_every)}: it has to be at most {most} '
      'whole numbers, 1 or above, one for each level of a block'
    )

  def one(keys, _):
    level = LEVEL.fullmatch(labels.path_of(keys))
    known = level and int(level[1]) < len(level_every)
    return level_every[int(level[1])] if known else 1

  return jax.tree_util.tree_map_with_path(one, params)
