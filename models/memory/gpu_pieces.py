"""Long streams in pieces, so that a GPU's memory does not grow with them.

Kernels put down what every chunk begins with, for what is read and for the way
back. Where no gradient is wanted a piece's go before the next is walked. Where
one is, with a `stride`, what pieces begin with is kept, and each is walked once
more, on the way back, before it is walked back.
"""

import functools

import jax
import jax.numpy as jnp

PIECE = 64  # chunks at most where no gradient is wanted
SHORT = 16  # a shorter piece leaves a GPU idle: `stride` means as many at least


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def walk(whole, cfg, dtype, initial, slow, carry, xs, ends_nxB):
  """`whole(cfg, initial, slow, carry, xs, ends_nxB, dtype)`, in pieces.

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

  def some(carry, piece):
    return whole(cfg, initial, slow, carry, *piece, dtype)

  return _in_turn(some, PIECE, carry, (xs, ends_nxB))


def _forward(whole, cfg, dtype, *arrays):
  *some, ends_nxB = arrays

  def all_at_once(*args):
    return whole(cfg, *args, ends_nxB, dtype)

  def again(initial, slow, carry, xs):
    # what all pieces share is no argument: it is kept once
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(carry, piece):
      return whole(cfg, initial, slow, carry, *piece, dtype)

    return _in_turn(piece, max(cfg.stride, SHORT), carry, (xs, ends_nxB))

  return jax.vjp(all_at_once if cfg.stride == 1 else again, *some)


def _backward(whole, cfg, dtype, back, gradients):
  return *back(gradients), None


walk.defvjp(_forward, _backward)


def _in_turn(step, most: int, carry, xs):
  """`lax.scan` over pieces of at most so many chunks, as equal as can be."""
  n = len(jax.tree.leaves(xs)[0])
  size = -(-n // -(-n // most))
  pieces, rest = n // size, n % size
  if n == size:
    return step(carry, xs)
  split = jax.tree.map(
    lambda x: x[: n - rest].reshape((pieces, size) + x.shape[1:]), xs
  )
  carry, out = jax.lax.scan(step, carry, split)
  out = out.reshape((n - rest,) + out.shape[2:])
  if not rest:
    return carry, out
  carry, more = step(carry, jax.tree.map(lambda x: x[n - rest :], xs))
  return carry, jnp.concatenate([out, more])
