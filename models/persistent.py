"""Persistent memory: learned tokens before all others (Titans section 3.3).

They have no position, so that a token sees them alike wherever it stands and
however its stream is cut.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestax.models.config import ModelConfig


class Tokens(nn.Module):
  """The persistent tokens `[P, D]`, as long as what a norm lets through."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self):
    init = nn.initializers.normal(1.0)
    tokens_PxD = self.param(
      'tokens',
      nn.with_logical_partitioning(init, ('memory', 'embed')),
      (self.cfg.persistent, self.cfg.D),
      jnp.float32,
    )
    return tokens_PxD.astype(self.cfg.compute_dtype)


class Persistent(NamedTuple):
  """Learned tokens that every query sees, at no position."""

  query_BxLxHxK: jax.Array  # the queries as they are before they are rotated
  key_PxGxK: jax.Array
  value_PxGxK: jax.Array


def attend(q, k, v, mask, persistent: Persistent | None = None):
  """Softmax attention over keys and, before them, persistent tokens.

  Keys twice as wide, half of them zero, let rotated queries meet rotated keys
  and plain queries the persistent ones in one product.

  Args:
    q: `[B, L, H, K]`, rotated.
    k, v: `[B, J, G, K]`, the keys rotated.
    mask: which keys each query sees, `[B, 1, L, J]`.
    persistent: tokens that all queries see, or None.
  """
  if persistent is None:
    return jax.nn.dot_product_attention(q, k, v, mask=mask)
  K, P = q.shape[-1], persistent.key_PxGxK.shape[0]

  def first(x_PxGxK, x_BxJxGxK):
    x = jnp.broadcast_to(x_PxGxK[None], (x_BxJxGxK.shape[0], *x_PxGxK.shape))
    return jnp.concatenate([x.astype(x_BxJxGxK.dtype), x_BxJxGxK], axis=1)

  def aside(x, before: int):
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((before, K - before),))

  y = jax.nn.dot_product_attention(
    jnp.concatenate([q, persistent.query_BxLxHxK], axis=-1),
    first(aside(persistent.key_PxGxK, K), aside(k, 0)),
    aside(first(persistent.value_PxGxK, v), 0),
    mask=jnp.pad(mask, ((0, 0),) * 3 + ((P, 0),), constant_values=True),
    scale=K**-0.5,
  )
  return y[..., :K]


def join(o_BxLxHxK, lse_BxHxL, persistent: Persistent):
  """What queries read from keys, and what they read from persistent tokens.

  Args:
    o_BxLxHxK: read from the keys alone.
    lse_BxHxL: log of the sum of exponentials of those logits, float32.
    persistent: tokens that all queries see as well.

  Returns:
    `attend` over both, of o's dtype.
  """
  B, L, H, K = o_BxLxHxK.shape
  P, G = persistent.key_PxGxK.shape[:2]
  q = persistent.query_BxLxHxK.reshape(B, L, G, H // G, K)
  logit_BxGxRxLxP = K**-0.5 * jnp.einsum(
    'blgrk,pgk->bgrlp', q, persistent.key_PxGxK,
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  logit_BxHxLxP = logit_BxGxRxLxP.reshape(B, H, L, P)
  lse_BxHxLx1 = lse_BxHxL[..., None]
  share = jax.nn.softmax(jnp.concatenate([lse_BxHxLx1, logit_BxHxLxP], -1))
  share = share.astype(o_BxLxHxK.dtype)
  first = jnp.einsum(
    'bgrlp,pgk->blgrk', share[..., 1:].reshape(B, G, H // G, L, P),
    persistent.value_PxGxK,
  ).reshape(o_BxLxHxK.shape)  # fmt: skip
  return first + o_BxLxHxK * jnp.moveaxis(share[..., :1], 1, 2)
