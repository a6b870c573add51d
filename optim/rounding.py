"""Stochastic rounding: a bfloat16 accumulator that loses nothing on average."""

import jax
import jax.numpy as jnp


def to_bfloat16(x: jax.Array, step: jax.typing.ArrayLike) -> jax.Array:
  """Rounds float32 up or down at random, so that the mean is the value.

  Rounding to nearest would drop every addend below 1/256 of the sum, which is
  most of what a slow momentum gathers. The noise is a hash of the element's
  position and of `step`: no key, and the same on every mesh.

  Args:
    x: float32; values that are not finite pass unchanged.
    step: int32, different at each call on the same accumulator.

  Returns:
    An array of the shape of `x` in bfloat16.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = _hash(x.shape, step) >> 16
  rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
  rounded = jax.lax.bitcast_convert_type(rounded, jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _hash(shape, step):
  """Mixes position and step (the finaliser of MurmurHash3)."""
  seed = jnp.asarray(step).astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
  x = jnp.broadcast_to(seed, shape)
  for axis in range(len(shape)):
    x = x * jnp.uint32(0x01000193)
    x = x ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)
