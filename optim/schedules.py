"""Learning rates over the steps: a linear warm-up, then half a cosine."""

import math

import jax
import jax.numpy as jnp
import optax


class ScheduleError(ValueError):
  """The numbers given do not make a schedule."""


def warmup_cosine(
  peak: float, warmup: int, steps: int, final_fraction: float = 0.1
) -> optax.Schedule:
  """Rises to `peak` in `warmup` steps, falls to a fraction of it at the end.

  The first step already has `peak / warmup`, so that no step is spent on a
  rate of zero; from step `warmup` on half a cosine leads down to
  `final_fraction * peak` at step `steps`, and stays there.

  Args:
    peak: the largest learning rate, positive.
    warmup: steps of the warm-up, 0 for none; fewer than `steps`.
    steps: steps of the whole schedule.
    final_fraction: between 0 and 1.

  Returns:
    A function from a step (int or int32 array) to a float32 scalar.

  Raises:
    ScheduleError: if a number is out of its range.
  """
  if not 0 < peak < math.inf:
    raise ScheduleError(
      f'the learning rate is {peak}: it has to be above 0, and finite'
    )
  if steps < 1:
    raise ScheduleError(f'the schedule has {steps} steps: it needs at least 1')
  if not 0 <= warmup < steps:
    raise ScheduleError(
      f'the warm-up is {warmup} steps of {steps} in all: it has to be at '
      'least 0 and shorter than the whole; lower opt.warmup or raise '
      'train.steps'
    )
  if not 0 <= final_fraction <= 1:
    raise ScheduleError(
      f'the final fraction of the learning rate is {final_fraction}: it has '
      'to lie between 0 and 1'
    )

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    rising = (step + 1) / max(warmup, 1)
    progress = jnp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    falling = final_fraction + (1 - final_fraction) * cosine
    return peak * jnp.where(step < warmup, rising, falling)

  return schedule
