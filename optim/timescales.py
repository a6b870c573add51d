"""Slow momenta of M3: each gathers a window of steps and acts after it.

Between the ends of two windows a momentum holds the finished windows and what
the open one has gathered, so that no second accumulator is needed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestax.optim import arguments, rounding


class TimeScale(NamedTuple):
  """A slow momentum: decay per window, steps per window, share of update."""

  beta: float = 0.9
  every: int = 10
  alpha: float = 0.5


def read(
  error: type[Exception], slow: Sequence[TimeScale], ema: bool
) -> tuple[TimeScale, ...]:
  """Makes time scales of tuples, and refuses what are none.

  Args:
    error: raised in words.
    slow: tuples (beta, every, alpha), the last ones optional.
    ema: whether beta is a decay, below 1.
  """
  try:
    scales = tuple(TimeScale(*scale) for scale in slow)
  except TypeError as cause:
    raise error(
      f'slow is {slow!r}: it has to be a sequence of TimeScale(beta, every, '
      'alpha), empty for none'
    ) from cause
  for i, scale in enumerate(scales):
    name = f'of slow momentum {i},'
    factor(error, f'{name} beta', scale.beta, ema)
    arguments.whole(error, f'{name} every', scale.every)
    arguments.within(error, f'{name} alpha', scale.alpha)
  return scales


def factor(error: type[Exception], name: str, value: Any, ema: bool) -> None:
  """Refuses a factor that does not decay, or that no sum can have.

  Algorithm 1 as printed adds factor * gradient: any size of it will do.
  """
  if ema:
    arguments.within(error, name, value, 0, 1)
  else:
    arguments.within(error, name, value)


def gather(
  grads: optax.Updates,
  momentum: optax.Updates,
  scale: TimeScale,
  count: jax.Array,
  ema: bool,
) -> optax.Updates:
  """Adds a float32 gradient; decays once a window, at its first step."""
  decay, share = 1.0, scale.beta
  if ema:
    first = (count - 1) % scale.every == 0
    decay = jnp.where(first, scale.beta, 1.0).astype(jnp.float32)
    share = (1 - scale.beta) / scale.every

  def one(g, m):
    total = decay * m.astype(jnp.float32) + share * g
    if m.dtype == jnp.bfloat16:
      return rounding.to_bfloat16(total, count)
    return total.astype(m.dtype)

  return jax.tree.map(one, grads, momentum)


def refresh(
  orthogonalize: Callable[[optax.Updates], optax.Updates],
  momentum: optax.Updates,
  direction: optax.Updates,
  scale: TimeScale,
  count: jax.Array,
) -> optax.Updates:
  """Gives the direction anew at a window's end, else the one there is."""

  def due(momentum, direction):
    # Cast first: the result then needs no more memory than is kept.
    momentum = jax.tree.map(lambda m, d: m.astype(d.dtype), momentum, direction)
    return orthogonalize(momentum)

  def not_due(momentum, direction):
    del momentum
    return direction

  return jax.lax.cond(
    count % scale.every == 0, due, not_due, momentum, direction
  )
