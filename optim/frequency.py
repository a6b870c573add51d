"""Update frequencies for groups of parameters (NL Def. 2 and Eq. 71, outside).

`optax.multi_transform({'fast': tx, 'slow': at_frequency(tx, 16)}, labels)`
gives the outer loop its own levels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestax.optim import arguments

REDUCE = ('mean', 'sum')


class FrequencyError(ValueError):
  """The arguments do not make an update frequency."""


class AtFrequencyState(NamedTuple):
  """Gradients since the last update, and the inner state."""

  count: jax.Array  # int32, steps since the last update
  gathered: optax.Updates  # float32
  inner: Any


def at_frequency(
  tx: optax.GradientTransformation,
  every: int,
  reduce: str = 'mean',
  last: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
  """Updates once in `every` steps, with all gradients since the last update.

  Between updates the parameters stay as they are, to the bit, and `tx` costs
  nothing: its step runs under `lax.cond`. Its schedules count updates.

  Extra arguments of `update` belong to one step, gathered gradients to all of
  a window: where `tx` can be told any, those that `last` does not name are
  refused. So are the inputs of `at_frequency(dgd(...), 4)`, whose exact step
  needs those of all four batches.

  Args:
    tx: any transformation, `at_frequency` itself included.
    every: steps a window, 1 or above; 1 is `tx`, but for the accumulator.
    reduce: 'mean' keeps the size of one gradient; 'sum' is NL Eq. 71.
    last: names of extra arguments that `tx` may have of a window's last step
      alone, such as `value` for `optax.contrib.reduce_on_plateau`, or does
      not read.

  Returns:
    The transformation; its accumulator is one float32 copy of the gradient.

  Raises:
    FrequencyError: for arguments out of range; from `update`, for extra
      arguments not in `last`.
  """
  arguments.whole(FrequencyError, 'every', every)
  arguments.one_of(FrequencyError, 'reduce', reduce, REDUCE)
  listens = isinstance(tx, optax.GradientTransformationExtraArgs)
  tx = optax.with_extra_args_support(tx)
  share = 1 / every if reduce == 'mean' else 1.0

  def init_fn(params):
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    return AtFrequencyState(jnp.zeros((), jnp.int32), zeros, tx.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    if listens and every > 1:
      _refuse(extra_args, every, last)
    gathered = jax.tree.map(
      lambda total, g: total + share * g.astype(jnp.float32),
      state.gathered,
      updates,
    )

    def due(gathered, inner):
      grads = jax.tree.map(lambda x, g: x.astype(g.dtype), gathered, updates)
      out, inner = tx.update(grads, inner, params, **extra_args)
      out = jax.tree.map(lambda x, g: x.astype(g.dtype), out, updates)
      return out, optax.tree.zeros_like(gathered), inner

    def not_due(gathered, inner):
      return optax.tree.zeros_like(updates), gathered, inner

    count = state.count + 1
    out, gathered, inner = jax.lax.cond(
      count == every, due, not_due, gathered, state.inner
    )
    return out, AtFrequencyState(count % every, gathered, inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _refuse(extra_args, every, last):
  wrong = sorted(set(extra_args) - set(last))
  if wrong:
    raise FrequencyError(
      f'the extra arguments {", ".join(wrong)} are of one step, the gradients '
      f'of {every}: where those of the last step will do, name them in `last`'
    )
