"""Next-token cross-entropy as sums, so that any split of a batch adds up."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.cms import objective


class Sums(NamedTuple):
  """What a batch adds up to, float32 scalars; batches add element by element.

  Means are taken once, at the end: a mean of means would weigh a token by the
  company it happens to be in.
  """

  nats: jax.Array  # weighted negative log-likelihood
  weight: jax.Array  # weighted number of targets
  bytes: jax.Array  # weighted number of UTF-8 bytes the targets stand for


def zero() -> Sums:
  return Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))


def sums(logits_BxLxV: jax.Array, batch) -> Sums:
  """Sums the cross-entropy of a batch's targets over its scored positions.

  Args:
    logits_BxLxV: float32.
    batch: `targets` int32, `weights` float32 (0 = not scored) and `bytes`
      int32, each `BxL`.
  """
  nats_BxL = objective.cross_entropy(logits_BxLxV, batch['targets'])
  weights_BxL = batch['weights']
  # `where`, not only a product: 0 * inf at a position that nobody scores
  # would make the whole step bad.
  nats_BxL = jnp.where(weights_BxL > 0, nats_BxL * weights_BxL, 0.0)
  return Sums(
    nats_BxL.sum(), weights_BxL.sum(), (weights_BxL * batch['bytes']).sum()
  )


def in_pieces(head, x_BxLxD: jax.Array, batch, piece: int) -> Sums:
  """The sums of `head(x)`, without the logits of all positions at once.

  The backward pass makes the logits of a piece again. Pieces are interleaved,
  so that a length in shards stays in its shards.

  Args:
    head: `x_BxlxD -> logits_BxlxV`.
    x_BxLxD: what the head reads.
    batch: as `sums` takes it, `BxL` each.
    piece: positions of a row at once, at most; as many as divide the length.
  """
  B, L = x_BxLxD.shape[:2]
  parts = next(n for n in range(-(-L // piece), L + 1) if L % n == 0)
  if parts == 1:
    return sums(head(x_BxLxD), batch)
  scored = {name: batch[name] for name in ('targets', 'weights', 'bytes')}

  def cut(x):
    return jnp.moveaxis(x.reshape(B, L // parts, parts, *x.shape[2:]), 2, 0)

  def one(total, given):
    x_BxlxD, part = given
    return jax.tree.map(jnp.add, total, sums(head(x_BxlxD), part)), None

  one = jax.checkpoint(one, prevent_cse=False)
  return jax.lax.scan(one, zero(), jax.tree.map(cut, (x_BxLxD, scored)))[0]


def means(total: Sums) -> dict[str, jax.Array]:
  """Turns sums into `loss` (nats a target) and `bits_per_byte`.

  The bits of special tokens (end of document) count and their bytes are 0:
  the number is what an ideal coder would spend on the text and its ends.
  """
  one = 1e-9  # no target at all gives 0, not a division by zero
  return {
    'loss': total.nats / (total.weight + one * (total.weight == 0)),
    'bits_per_byte': total.nats
    / math.log(2)
    / (total.bytes + one * (total.bytes == 0)),
  }
