"""Moments of gradients that M3 keeps, decaying ('ema') or summed ('sum')."""

import jax
import jax.numpy as jnp
import optax


def gather(
  grads: optax.Updates,
  moment: optax.Updates,
  beta: jax.typing.ArrayLike,
  order: int,
  ema: bool,
) -> optax.Updates:
  """Adds the gradients to the power of `order`, the moment's.

  'ema' is beta m + (1 - beta) g^order, else m + beta g^order as Algorithm 1
  of NL has it.
  """
  if ema:
    return optax.tree.update_moment(grads, moment, beta, order)
  return jax.tree.map(lambda g, m: m + beta * g**order, grads, moment)


def look_ahead(
  grads: optax.Updates,
  moment: optax.Updates,
  beta: jax.typing.ArrayLike,
  count: jax.Array,
) -> optax.Updates:
  """Nesterov's momentum with the bias corrections of Dozat and optax."""
  step = count.astype(jnp.float32)
  now = optax.tree.bias_correction(grads, beta, step)
  then = optax.tree.bias_correction(moment, beta, step + 1)
  return jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, then, now)


def divide(
  updates: optax.Updates,
  second: optax.Updates,
  beta: jax.typing.ArrayLike,
  count: jax.Array,
  eps: jax.typing.ArrayLike,
  ema: bool,
) -> optax.Updates:
  """Divides by the root of a second moment, its bias corrected if 'ema'."""
  if ema:
    step = count.astype(jnp.float32)
    second = optax.tree.bias_correction(second, beta, step)
  return jax.tree.map(lambda t, v: t / (jnp.sqrt(v) + eps), updates, second)
