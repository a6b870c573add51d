"""Softmax attention over long rows, a block of queries at a time.

Plain XLA for machines and cases without a kernel: no more than a block's
logits are held, forward or back, so that memory grows with the length and not
with its square. Without a window a block multiplies with all keys, those after
it too, as attention by all logits at once does.
"""

import jax
import jax.numpy as jnp

from nestax.models.persistent import attend

LONG = 2048  # tokens; shorter rows take all their logits at once
BLOCK = 512  # queries


def visible(query_position, key_position, start, window: int):
  """Which keys `[B, 1, J]` each query `[B, I, 1]` sees, `[B, 1, I, J]`."""
  age = query_position - key_position
  seen = (age >= 0) & (key_position >= start)
  if window:
    seen = seen & (age < window)
  return seen[:, None]


def read(
  q, k, v, start_BxL, persistent, *, window: int = 0, block: int = BLOCK
):
  """What each query of fresh sequences reads, `[B, L, H, K]`.

  Args:
    q: `[B, L, H, K]`, rotated.
    k, v: `[B, L, G, K]`, the keys rotated.
    start_BxL: position at which each token's document began, or None.
    persistent: tokens that all queries see, or None.
    window: tokens that a query sees, itself one of them; 0 for all.
    block: queries whose logits are held at once.
  """
  B, L = q.shape[:2]
  if start_BxL is None:
    start_BxL = jnp.zeros((B, L), jnp.int32)
  reach = min(L, window - 1 + block) if window else L
  cut = jax.tree.map(
    lambda x: _cut(x, block),
    (q, start_BxL, None if persistent is None else persistent.query_BxLxHxK),
  )

  # the logits of a block are cheaper to compute again than to keep
  @jax.checkpoint
  def one(i, q, start, query):
    end = (i + 1) * block
    low = jnp.clip(end - reach, 0, L - reach)
    keys, values = (
      jax.lax.dynamic_slice_in_dim(x, low, reach, axis=1) for x in (k, v)
    )
    position = (end - block + jnp.arange(block))[None, :, None]
    mask = visible(
      position, (low + jnp.arange(reach))[None, None], start[..., None], window
    )
    first = (
      None if persistent is None else persistent._replace(query_BxLxHxK=query)
    )
    return attend(q, keys, values, mask, first)

  count = cut[0].shape[0]
  o = jax.lax.map(lambda x: one(x[0], *x[1]), (jnp.arange(count), cut))
  o = jnp.moveaxis(o, 0, 1)
  return o.reshape(B, count * block, *o.shape[3:])[:, :L]


def _cut(x, block: int):
  """`[B, L, ...] -> [L / block, B, block, ...]`, the last block filled up."""
  B, L = x.shape[:2]
  x = jnp.pad(x, ((0, 0), (0, -L % block)) + ((0, 0),) * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)
