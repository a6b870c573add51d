"""What a level learns from: sums over the scored tokens of a chunk.

`next_token` is the paper's: the end-to-end loss of the whole network (NL
section 7.1). `reconstruction` is local: a level regresses the value of each
token from its key, where the key is the level's own normalised input and the
value that of the next token times a slow scale; nothing is sent back through
the network.

Both score position t where the stream has token t + 1 in the same chunk and
the same document: a chunk learns from C - 1 pairs, so that a commit waits for
no token that has not been read.
"""

import jax
import jax.numpy as jnp

OBJECTIVES = ('next_token', 'reconstruction')


def scored(reset_BxL, length_B, B: int, L: int):
  """Which positions of a chunk are scored, bool `[B, L]`.

  Args:
    reset_BxL: True where a document starts, or None.
    length_B: valid tokens, or None for all L.
    B: sequences.
    L: tokens.
  """
  follows = jnp.broadcast_to(jnp.arange(1, L + 1)[None] < L, (B, L))
  if length_B is not None:
    follows = jnp.arange(1, L + 1)[None] < length_B[:, None]
  if reset_BxL is not None:
    starts = jnp.pad(reset_BxL[:, 1:], ((0, 0), (0, 1)))
    follows = follows & ~starts
  return follows


def next_token(logits_BxLxV, tokens_BxL, scored_BxL):
  """Cross-entropy in nats, summed over each sequence's scored tokens, `[B]`."""
  nats_BxL = cross_entropy(
    logits_BxLxV.astype(jnp.float32), jnp.roll(tokens_BxL, -1, axis=1)
  )
  return jnp.where(scored_BxL, nats_BxL, 0.0).sum(1)


@jax.custom_vjp
def cross_entropy(logits_BxLxV, targets_BxL):
  """Nats of each target, float32 `[B, L]`; the logits are float32.

  Without an index: its gradient would be scattered, one by one on TPUs. The
  gradient is written down, `softmax - hit`: one that is found holds arrays as
  large as the logits that are the same in every chunk, and would be made once
  and read in each. So there is no forward mode (`jax.jvp`) of it.
  """
  return _cross_entropy_fwd(logits_BxLxV, targets_BxL)[0]


def _cross_entropy_fwd(logits_BxLxV, targets_BxL):
  hit_BxLxV = _hit(logits_BxLxV, targets_BxL)
  target_BxL = jnp.where(hit_BxLxV, logits_BxLxV, 0.0).sum(-1)
  total_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
  return total_BxL - target_BxL, (logits_BxLxV, targets_BxL, total_BxL)


def _cross_entropy_bwd(kept, d_out_BxL):
  logits_BxLxV, targets_BxL, total_BxL = kept
  chance_BxLxV = jnp.exp(logits_BxLxV - total_BxL[..., None])
  slope_BxLxV = chance_BxLxV - _hit(logits_BxLxV, targets_BxL)
  return slope_BxLxV * d_out_BxL[..., None], None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _hit(logits_BxLxV, targets_BxL):
  """Whether a token of the vocabulary is the target."""
  # int32, since the targets may be bytes and V beyond them
  ids_1x1xV = jnp.arange(logits_BxLxV.shape[-1], dtype=jnp.int32)[None, None]
  return ids_1x1xV == targets_BxL[..., None].astype(jnp.int32)


def reconstruction(y_BxLxD, key_BxLxD, scale_D, scored_BxL):
  """Half the mean square of `M(key_t) - scale * key_{t+1}`, summed, `[B]`."""
  value_BxLxD = scale_D * jnp.roll(key_BxLxD, -1, axis=1).astype(jnp.float32)
  error_BxLxD = y_BxLxD.astype(jnp.float32) - value_BxLxD
  half_BxL = 0.5 * jnp.square(error_BxLxD).mean(-1)
  return jnp.where(scored_BxL, half_BxL, 0.0).sum(1)
