"""The optimisers that are compared, all but DGD linear in the learning rate.

Matrices take the rule of the name, the rest of the parameters AdamW.
"""

from collections.abc import Sequence

import jax
import ml_collections
import optax

from nestax.launch import optimizer
from nestax.launch.evals import sweep
from nestax.optim import dgd, labels, m3, momentum

DECAY = 0.1  # weight decay of matrices
NAMES = ('adamw', 'muon', 'm3', 'sgdm', 'delta', 'dgd')


def make(
  name: str,
  params,
  rules: Sequence[labels.Rule],
  schedule: optax.Schedule,
  decay: float = DECAY,
) -> sweep.Make:
  """Gives an optimiser as a function of the peak learning rate.

  Args:
    name: one of NAMES: AdamW, Muon, M3 with one slow momentum (10 steps),
      heavy-ball momentum 0.9 on all parameters, delta momentum 0.9 and delta
      gradient descent on the matrices.
    params: parameters or their shapes.
    rules: of `labels.label`, with the labels 'matrix' and 'rest'.
    schedule: with a peak of 1.
    decay: decoupled weight decay of the matrices.
  """
  names = labels.label(params, rules)
  decayed = jax.tree.map(lambda label: label == 'matrix', names)
  adamw = optax.adamw(
    schedule, 0.9, 0.95, weight_decay=decay, mask=_known(decayed)
  )
  if name == 'dgd':  # its step is not linear in the rate
    return lambda rate: optax.partition(
      {
        'matrix': dgd.dgd(lambda count: rate * schedule(count)),
        'rest': optax.chain(adamw, optax.scale(rate)),
      },
      names,
    )
  if name == 'adamw':
    tx = adamw
  elif name == 'sgdm':
    tx = optax.chain(optax.trace(0.9), *_tail(schedule, decay, decayed))
  else:
    tx = optax.partition(
      {'matrix': _matrix(name, schedule, decay), 'rest': adamw}, names
    )
  return scaled(optax.chain(optax.clip_by_global_norm(1.0), tx))


def of_config(config: ml_collections.ConfigDict, params) -> sweep.Make:
  """Gives the optimiser of a config as a function of its learning rate."""
  config = ml_collections.ConfigDict(config.to_dict())
  config.opt.lr = 1.0
  tx, _ = optimizer.build(config, params)
  return scaled(tx)


def scaled(tx: optax.GradientTransformation) -> sweep.Make:
  """Puts a learning rate behind an optimiser whose own is 1 at its peak."""
  return lambda rate: optax.chain(tx, optax.scale(rate))


def _matrix(name, schedule, decay):
  if name == 'delta':
    delta = momentum.scale_by_delta_momentum(0.9)
    return optax.chain(delta, *_tail(schedule, decay, None))
  slow = (m3.TimeScale(),) if name == 'm3' else ()
  return m3.m3(schedule, slow=slow, weight_decay=decay, nesterov=True)


def _tail(schedule, decay, decayed):
  mask = None if decayed is None else _known(decayed)
  return (
    optax.add_decayed_weights(decay, mask),
    optax.scale_by_learning_rate(schedule),
  )


def _known(decayed):
  # A function, since inside optax.partition some leaves are masked away.
  known = dict(zip(labels.paths(decayed), jax.tree.leaves(decayed)))

  def mask(params):
    return jax.tree_util.tree_map_with_path(
      lambda keys, _: known[labels.path_of(keys)], params
    )

  return mask
