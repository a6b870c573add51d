"""Long streams in pieces, so that a GPU's memory does not grow with them.

Kernels put down what every chunk begins with, for what is read and for the way
back. Where no gradient is wanted, and that is more than `ROOM`, a piece's go
before the next is walked. Where one is, with a `stride`, what pieces begin with
is kept, and each is walked once more, on the way back, before it is walked
back. Pieces are cut out of the stream, and what they give is put in its place:
copies that a walk over all of it does not make.
"""

import functools

import jax
import jax.numpy as jnp

# Bytes that the chunks of a piece of more than PIECE begin with; of each run
# where `vmap` has several.
ROOM = 4 << 30
PIECE = 64  # chunks, since kernels want many at once
SHORT = 16  # the same where a gradient is wanted, with a shorter `stride`


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def walk(whole, cfg, dtype, initial, slow, carry, xs, ends_nxB):
  """`whole(cfg, initial, slow, carry, xs, ends_nxB, dtype)`, in pieces.

  Args:
    whole: as `scan.walk_chunks`, from a boundary on; what follows are its
      arguments.
    cfg: see there.
    dtype: see there.
    initial: see there.
    slow: see there.
    carry: see there.
    xs: see there.
    ends_nxB: see there.

  Returns:
    (carry, output [n, B, H, C, K]).
  """
  step = _step(whole, cfg, dtype, initial, slow)
  return _in_turn(step, step, _most(carry), carry, (xs, ends_nxB))


def _forward(whole, cfg, dtype, *arrays):
  *learned, ends_nxB = arrays

  def all_at_once(*args):
    return whole(cfg, *args, ends_nxB, dtype)

  def again(initial, slow, carry, xs):
    step = _step(whole, cfg, dtype, initial, slow)
    # without a loop, the compiler would take both walks for one
    alone = jax.checkpoint(step)
    looped = jax.checkpoint(step, prevent_cse=False)
    most = max(cfg.stride, SHORT)
    return _in_turn(looped, alone, most, carry, (xs, ends_nxB))

  return jax.vjp(all_at_once if cfg.stride == 1 else again, *learned)


def _backward(whole, cfg, dtype, back, gradients):
  return *back(gradients), None


walk.defvjp(_forward, _backward)


def _most(carry) -> int:
  """Chunks of a piece where no gradient is wanted."""
  _, *state = carry
  state = jax.tree.leaves(state)
  return max(PIECE, ROOM // sum(x.size * x.dtype.itemsize for x in state))


def _step(whole, cfg, dtype, initial, slow):
  """`whole` of a piece of the chunks and their ends, as a scan's body."""
  return lambda carry, piece: whole(cfg, initial, slow, carry, *piece, dtype)


def _in_turn(looped, alone, most: int, carry, xs):
  """Pieces of at most so many chunks, of one length or of two next to it.

  Those of one length are scanned by `looped`; one by itself is `alone`.
  """
  n = len(jax.tree.leaves(xs)[0])
  pieces = -(-n // most)
  short, longer = divmod(n, pieces)
  outs, first = [], 0
  for count, size in (longer, short + 1), (pieces - longer, short):
    if not count:
      continue
    end = first + count * size
    some = jax.tree.map(lambda x, part=slice(first, end): x[part], xs)
    if count == 1:
      carry, out = alone(carry, some)
    else:
      shape = count, size
      split = jax.tree.map(
        lambda x, shape=shape: x.reshape(shape + x.shape[1:]), some
      )
      carry, out = jax.lax.scan(looped, carry, split)
      out = out.reshape((count * size,) + out.shape[2:])
    outs.append(out)
    first = end
  return carry, outs[0] if len(outs) == 1 else jnp.concatenate(outs)
