"""Whether the arrays of a checkpoint are those that were saved."""

from typing import Any

import jax
import jax.numpy as jnp


@jax.jit
def _word_sums(parts):
  def words(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    if x.dtype == bool:
      return x.sum(dtype=jnp.uint32)
    word = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
    return jax.lax.bitcast_convert_type(x, word).sum(dtype=jnp.uint32)

  zero = jnp.zeros((), jnp.uint32)
  return {
    name: sum((words(x) for x in jax.tree.leaves(part)), start=zero)
    for name, part in parts.items()
  }


def of(parts: dict[str, Any]) -> dict[str, int]:
  """Adds up the bits of all arrays of each part, modulo 2**32.

  The same on every mesh. TensorStore keeps no checksum of array data: without
  this a flipped byte is restored as if nothing had happened.
  """
  return {k: int(v) for k, v in jax.device_get(_word_sums(parts)).items()}


def check(want: dict[str, int], parts: dict[str, Any]) -> None:
  """Raises a ValueError if a part is not what was fingerprinted."""
  if of(parts) != {name: want[name] for name in parts}:
    raise ValueError('its numbers are not those that were saved')
