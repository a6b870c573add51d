"""Tokens in, logits out: one pure function for training, streaming, sampling.

`apply(params, state, tokens) -> (state, logits)`: the state holds everything
that is per sequence. There is no train-time and no test-time model.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestax.models import axes
from nestax.models import block as blocks
from nestax.models.config import ModelConfig
from nestax.models.layers import Embedding, RMSNorm


class LanguageModel(nn.Module):
  """Embedding, N equal blocks, norm, head.

  Call: `(state, tokens_BxL, reset_BxL=None) -> (state, logits_BxLxV)`.
    state: from `init_state`, leaves `[N, B, ...]`; None for fresh sequences
      whose end state nobody needs (training), then None comes back.
    tokens_BxL: int32 ids, any L.
    reset_BxL: True where a document starts: the sequence forgets there.
    logits_BxLxV: float32.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(self, state, tokens_BxL, reset_BxL=None):
    cfg = self.cfg
    embed = Embedding(cfg.V, cfg.D, cfg.compute_dtype, name='embed')

    def body(block, x_BxLxD, state):
      state, x_BxLxD = block(state, x_BxLxD, reset_BxL)
      return x_BxLxD, state

    scanned = nn.scan(
      body,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=cfg.N,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    block = blocks.remat(blocks.Block, cfg.remat)(cfg, name='blocks')
    x_BxLxD, state = scanned(block, embed(tokens_BxL), state)
    # the tied head's rows have unit norm: without this the token just read
    # would start with a logit of sqrt(D)
    initial = cfg.D**-0.5 if cfg.tied else 1.0
    norm = RMSNorm(
      (cfg.D,),
      ('activation',),
      initial,
      cfg.compute_dtype,
      cfg.epsilon,
      name='final_norm',
    )
    x_BxLxD = norm(x_BxLxD)
    if cfg.tied:
      logits = embed.attend(x_BxLxD)
    else:
      init = nn.initializers.normal(1 / cfg.D)
      head = self.param(
        'head',
        nn.with_logical_partitioning(init, ('embed', 'vocab')),
        (cfg.D, cfg.V),
        jnp.float32,
      )
      logits = jnp.einsum(
        'bld,dv->blv',
        x_BxLxD,
        head.astype(cfg.compute_dtype),
        preferred_element_type=jnp.float32,
      )
    return state, axes.constrain(logits, 'batch', 'length', 'vocab')


def init_state(cfg: ModelConfig, batch: int, length: int):
  """State of `batch` fresh sequences; every leaf is `[N, batch, ...]`.

  Args:
    cfg: the model.
    batch: number of sequences.
    length: tokens that attention must be able to look back on; a memory
      needs none of it.
  """
  one = blocks.init_state(cfg, batch, length)
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x[None], (cfg.N, *x.shape)), one
  )


def abstract_params(cfg: ModelConfig):
  """Shapes of the parameters, boxed with their logical axes; allocates none."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  init = LanguageModel(cfg).init
  return jax.eval_shape(
    lambda key, t: init(key, None, t)['params'], jax.random.key(0), tokens
  )


def parameter_count(cfg: ModelConfig) -> int:
  """Number of parameters, the embedding included."""
  leaves = jax.tree.leaves(nn.unbox(abstract_params(cfg)))
  return sum(leaf.size for leaf in leaves)


def flops_per_token(cfg: ModelConfig, length: int) -> float:
  """Forward FLOPs per token of a sequence of `length` tokens.

  Counts the matmuls: two per parameter that multiplies a token (the embedding
  only where it is the head), causal attention over half the length or the
  window, and the memory recurrence's reads, writes and triangular solve.
  A training step costs three times as much.
  """
  lookup = cfg.V * cfg.D
  matmul = parameter_count(cfg) - (0 if cfg.tied else lookup)
  flops = 2.0 * matmul
  K = cfg.head_width
  if cfg.family == 'hope':
    rule = cfg.memory
    flops -= 2.0 * cfg.N * cfg.H * _memory_size(cfg)  # counted per token below
    C = rule.chunks[0]
    R = max(stop for _, stop in rule.rows(K).values())
    wide = sum(K * rule.expansion for _ in rule.deep)
    # reads of x, of the errors, of D in the system, and the outer update
    per_head = 2.0 * 4 * (R * K + wide * K)
    # K K^T, Q K^T, T rhs, the chunk's own reads, and the inverse of I + L
    per_head += 2.0 * (2 * C * K + C * R + C * K + C * C / 3)
    if rule.momentum:
      per_head += 2.0 * (2 * R * K + C * R + C * K + 2 * C * C)
    flops += cfg.N * cfg.H * per_head
  else:
    seen = min(length / 2, cfg.window or length)
    flops += cfg.N * cfg.H * 4.0 * seen * K
  return flops


def _memory_size(cfg: ModelConfig) -> int:
  K, F = cfg.head_width, cfg.head_width * cfg.memory.expansion
  return sum(
    2 * F * K if box in cfg.memory.deep else K * K for box in cfg.memory.boxes
  )
