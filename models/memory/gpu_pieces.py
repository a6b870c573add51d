"""A walk that wants no gradients takes a long stream in pieces.

Kernels put down what every chunk begins with, for what is read and for the way
back. Without one a piece's can go before the next is walked: memory grows by
the stream's inputs and outputs alone.
"""

import functools

import jax
import jax.numpy as jnp

PIECE = 64  # chunks at most


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def walk(whole, cfg, dtype, initial, slow, carry, xs, ends_nxB):
  """`whole(cfg, initial, slow, carry, xs, ends_nxB, dtype)`.

  In pieces of equal numbers of chunks, but for the last; where a gradient is
  wanted all at once, as the way back wants it.

  Args:
    whole: as `scan.walk_chunks`, from a boundary on.
    cfg: its arguments.
    dtype: the same.
    initial: the same.
    slow: the same.
    carry: the same.
    xs: the same.
    ends_nxB: the same.

  Returns:
    (carry, output [n, B, H, C, K]).
  """
  n = ends_nxB.shape[0]
  size = -(-n // -(-n // PIECE))
  pieces, rest = n // size, n % size

  def some(carry, piece):
    return whole(cfg, initial, slow, carry, *piece, dtype)

  if n == size:
    return some(carry, (xs, ends_nxB))
  split = jax.tree.map(
    lambda x: x[: n - rest].reshape((pieces, size) + x.shape[1:]),
    (xs, ends_nxB),
  )
  carry, out = jax.lax.scan(some, carry, split)
  out = out.reshape((n - rest,) + out.shape[2:])
  if not rest:
    return carry, out
  last = jax.tree.map(lambda x: x[n - rest :], (xs, ends_nxB))
  carry, more = some(carry, last)
  return carry, jnp.concatenate([out, more])


def _forward(whole, cfg, dtype, *arrays):
  *some, ends_nxB = arrays
  return jax.vjp(lambda *args: whole(cfg, *args, ends_nxB, dtype), *some)


def _backward(whole, cfg, dtype, back, gradients):
  return *back(gradients), None


walk.defvjp(_forward, _backward)
