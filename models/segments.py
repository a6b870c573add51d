"""Runs of equal blocks of a model, read one after the other."""

import jax
import jax.numpy as jnp

from nestax.models import block as blocks

FEW = 4  # blocks of a segment up to which its chunks are read without a loop


def layers(tree, start: int, stop: int):
  """Some of the blocks of a tree whose leaves are stacked by block."""
  return jax.tree.map(lambda x: x[start:stop], tree)


def layer(tree, index: int):
  """One block of a tree whose leaves are stacked by block."""
  return jax.tree.map(lambda x: x[index], tree)


def join(*parts):
  """Parts of a tree's leaf, one after the other by block."""
  return jnp.concatenate(parts, 0) if len(parts) > 1 else parts[0]


def one_by_one(params, segment):
  """The parameters of each of a segment's blocks, where they are few.

  To pick a block by an index costs more than to read a chunk with it.
  """
  if segment.stop - segment.start > FEW:
    return params
  own = layers(params, segment.start, segment.stop)
  return [layer(own, i) for i in range(segment.stop - segment.start)]


def run_blocks(
  cfg, params, segment, mixers, x_BxLxD, reset_BxL, *, remat=False, **options
):
  """Runs a segment's blocks; returns (mixers or None, x, keys).

  `params` are those of all blocks, or as `one_by_one` gives them.
  With `remat` the backward pass recomputes as the config says; the active
  phase recomputes whole chunks instead.
  `deltas`, if among the options, have a leading axis of the segment's blocks;
  `owned` has one of all blocks.
  """
  deltas = options.pop('deltas', None)
  owned = layers(options.pop('owned', None), segment.start, segment.stop)
  block = blocks.Block(cfg, parent=None)

  def body(x_BxLxD, layer):
    params, mixers, deltas, owned = layer
    mixers, x_BxLxD, keys = block.apply(
      {'params': params},
      mixers,
      x_BxLxD,
      reset_BxL,
      deltas=deltas,
      owned=owned,
      **options,
    )
    return x_BxLxD, (mixers, keys)

  n = segment.stop - segment.start
  if remat:
    body = blocks.remat(body, cfg, 1 if isinstance(params, list) else n)
  if isinstance(params, list):
    found = []
    for i, own in enumerate(params):
      mine = [
        d[i] if isinstance(d, list) else layer(d, i) for d in deltas or ()
      ]
      given = layer(mixers, i), mine or None, layer(owned, i)
      x_BxLxD, one = body(x_BxLxD, (own, *given))
      found.append(one)
    mixers, keys = jax.tree.map(lambda *x: jnp.stack(x), *found)
    return mixers, x_BxLxD, keys
  if x_BxLxD.shape[1] == 1:
    # to cut the blocks out of all of them would cost more than to read them
    every, inner = params, body
    params = jnp.arange(segment.start, segment.stop)

    def body(x_BxLxD, layer):
      picked = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, layer[0], 0, False), every
      )
      return inner(x_BxLxD, (picked, *layer[1:]))
  else:
    params = layers(params, segment.start, segment.stop)
  x_BxLxD, (mixers, keys) = jax.lax.scan(
    body,
    x_BxLxD,
    (params, mixers, deltas, owned),
    unroll=min(cfg.unroll, n) if remat else 1,
  )
  return mixers, x_BxLxD, keys
