"""Update frequencies for groups of parameters (NL Def. 2 and Eq. 71, outside).

`optax.multi_transform({'fast': tx, 'slow': at_frequency(tx, 16)}, labels)`
gives the outer loop its own levels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

REDUCE = ('mean', 'sum')


class FrequencyError(ValueError):
  """The arguments do not make an update frequency."""


class AtFrequencyState(NamedTuple):
  """Gradients since the last update, and the inner state."""

  count: jax.Array  # int32, steps since the last update
  gathered: optax.Updates  # float32
  inner: Any


def at_frequency(
  tx: optax.GradientTransformation, every: int, reduce: str = 'mean'
) -> optax.GradientTransformationExtraArgs:
  """Updates once in `every` steps, with all gradients since the last update.

  Between updates the parameters stay as they are, to the bit, and `tx` costs
  nothing: its step runs under `lax.cond`. Its schedules count updates.

  Args:
    tx: any transformation, `at_frequency` itself included.
    every: steps a window, 1 or above; 1 is `tx`, but for the accumulator.
    reduce: 'mean' keeps the size of one gradient; 'sum' is NL Eq. 71.

  Returns:
    The transformation; its accumulator is one float32 copy of the gradient.

  Raises:
    FrequencyError: for arguments out of range.
  """
  if not isinstance(every, int) or every < 1:
    raise FrequencyError(
      f'a group is updated every {every!r} steps: it has to be a whole '
      'number, 1 or above'
    )
  if reduce not in REDUCE:
    raise FrequencyError(
      f'reduce is {reduce!r}: it has to be one of ' + ', '.join(REDUCE)
    )
  tx = optax.with_extra_args_support(tx)
  share = 1 / every if reduce == 'mean' else 1.0

  def init_fn(params):
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    return AtFrequencyState(jnp.zeros((), jnp.int32), zeros, tx.init(params))

  def update_fn(updates, state, params=None, **extra_args):
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
