"""What one chunk of one head is, and the products of gates inside it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.types import MemoryConfig

# Of rates handed in to kernels, where products of gates are sums of logs.
LEAST_ETA = 1e-20
# A memory that keeps less than this of itself has forgotten all. Chunks take
# differences of sums of logs: of two infinite ones there is none, and beside a
# large one the others are rounded.
LEAST_LOG = -30.0


class Chunk(NamedTuple):
  """Inputs of one chunk of one head."""

  query_CxK: jax.Array
  key_CxK: jax.Array
  value_CxK: jax.Array
  log_beta_C: jax.Array | None
  reset_C: jax.Array | None  # bool
  live_C: jax.Array | None  # bool; None: all are
  eta_C: jax.Array | None = None  # the gates that `cfg.given` names
  log_alpha_C: jax.Array | None = None


class Decay(NamedTuple):
  """Products of the gates inside a chunk; `_p`: up to the token before."""

  G_CxC: jax.Array
  G_p_CxC: jax.Array
  g_C: jax.Array
  g_p_C: jax.Array
  anchor_C: jax.Array | None  # what is left of the initial value
  anchor_p_C: jax.Array | None
  A_CxC: jax.Array | None  # momentum
  A_p_CxC: jax.Array | None
  c_C: jax.Array | None
  c_p_C: jax.Array | None
  B_last_C: jax.Array | None
  b_last: jax.Array | None


def _ratios(log_C, mask_CxC):
  """exp(sum over (i, t]) of log gates, and the same up to the token before."""
  total_C = jnp.cumsum(log_C)
  before_C = total_C - log_C
  upto = total_C[:, None] - total_C[None, :]
  upto_p = before_C[:, None] - total_C[None, :]
  strict = jnp.tril(mask_CxC, -1)
  # masked before the exponential: above the diagonal it would overflow
  X = jnp.where(mask_CxC, jnp.exp(jnp.where(mask_CxC, upto, 0.0)), 0.0)
  X_p = jnp.where(strict, jnp.exp(jnp.where(strict, upto_p, 0.0)), 0.0)
  return X, X_p, total_C, before_C


def decays(cfg: MemoryConfig, log_alpha_C, chunk: Chunk) -> Decay:
  """All products of gates that a chunk needs, float32."""
  C = log_alpha_C.shape[0]
  mask = jnp.tril(jnp.ones((C, C), bool))
  alive_C = jnp.ones((C,), log_alpha_C.dtype)
  if chunk.reset_C is not None:
    document_C = jnp.cumsum(chunk.reset_C.astype(jnp.int32))
    mask = mask & (document_C[:, None] == document_C[None, :])
    alive_C = (document_C == 0).astype(log_alpha_C.dtype)
  G, G_p, total, before = _ratios(log_alpha_C, mask)
  g, g_p = jnp.exp(total) * alive_C, jnp.exp(before) * alive_C
  anchor = anchor_p = None
  if cfg.anchor == 'zero':
    start = jnp.zeros_like(total)
    if chunk.reset_C is not None:
      # `before` never grows, so the least is that of the latest reset
      start = jax.lax.cummin(jnp.where(chunk.reset_C, before, 0.0))
    anchor, anchor_p = jnp.exp(total - start), jnp.exp(before - start)
  if not cfg.momentum:
    none = (None,) * 6
    return Decay(G, G_p, g, g_p, anchor, anchor_p, *none)
  B, _, total_b, _ = _ratios(chunk.log_beta_C, mask)
  b = jnp.exp(total_b) * alive_C
  # a token of padding lets the momentum pass by without adding it
  live = 1.0 if chunk.live_C is None else chunk.live_C[None, :]
  # GPUs and TPUs round what a product of float32 takes, unless they are told
  product = functools.partial(jnp.matmul, precision='highest')
  return Decay(
    G, G_p, g, g_p, anchor, anchor_p,
    *(product(left * live, right) for right in (B, b) for left in (G, G_p)),
    B[-1], b[-1],
  )  # fmt: skip


@jax.custom_vjp
def log_rate(eta):
  """Of rates that are handed in; those of zero get their gradient, too."""
  return jnp.log(jnp.maximum(eta, LEAST_ETA))


log_rate.defvjp(
  lambda eta: (log_rate(eta), eta),
  lambda eta, d: (d / jnp.maximum(eta, LEAST_ETA),),
)
