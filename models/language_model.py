"""Tokens in, logits out: one pure function for training, streaming, sampling.

`apply(params, state, tokens) -> (state, logits)`: the state holds everything
that is per sequence. There is no train-time and no test-time model.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestax.cms.stream import Piece
from nestax.models import (
  active,
  axes,
  border,
  layers,
  model_state,
  segments,
  telemetry,
)
from nestax.models import block as blocks
from nestax.models.config import ModelConfig
from nestax.models.continuum import Segment
from nestax.models.families import FAMILY
from nestax.models.layers import Embedding, RMSNorm
from nestax.models.memory import cost
from nestax.models.model_state import ModelState


class LanguageModel(nn.Module):
  """Embedding, N equal blocks, norm, head.

  Call: `(state, tokens_BxL, reset_BxL=None) -> (state, logits_BxLxV)`.
    state: from `model_state.init_state`; None for fresh sequences whose end
      state nobody needs (training), then None comes back.
    tokens_BxL: ids, whole numbers from 0 to V - 1, any L.
    reset_BxL: bool, True where a document starts: the sequence forgets there.
      The grids of chunks and periods stay, so that it is read as a fresh row
      is, to rounding, if it starts where all of them do.
    logits_BxLxV: float32; under `jax.jit` NaN from an id out of range on.

  Call it in `jax.jit`: outside, every call is compiled anew. It has derivatives
  and theirs, but no `jax.jvp`. What does not fit is refused, see `border`.
  """

  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    self.embed = Embedding(cfg.V, cfg.D, cfg.compute_dtype)
    self.blocks = blocks.remat(blocks.Block, cfg, cfg.N)(cfg)
    # the tied head's rows have unit norm: without this the token just read
    # would start with a logit of sqrt(D)
    initial = cfg.D**-0.5 if cfg.tied else 1.0
    self.final_norm = RMSNorm(
      (cfg.D,),
      ('activation',),
      initial,
      cfg.compute_dtype,
      cfg.epsilon,
    )
    if not cfg.tied:
      init = nn.initializers.normal(1 / cfg.D)
      names = ('embed', 'vocab')
      self.head = self.param(
        'head',
        nn.with_logical_partitioning(init, names),
        (cfg.D, cfg.V),
        jnp.float32,
      )
    if cfg.stream:
      init = nn.initializers.constant(np.log(max(cfg.cms.rate, 1e-30)))
      self.log_rate = self.param(
        'log_rate',
        nn.with_logical_partitioning(init, ('layers', 'levels')),
        (len(cfg.adapting), len(cfg.schedule.levels)),
        jnp.float32,
      )

  def __call__(self, state, tokens_BxL, reset_BxL=None):
    state, x_BxLxD = self.trunk(state, tokens_BxL, reset_BxL)
    return state, self.logits(x_BxLxD)

  def trunk(self, state, tokens_BxL, reset_BxL=None):
    """All but the head: `(state, x_BxLxD)`."""
    cfg = self.cfg
    like = functools.partial(model_state.like, cfg)
    tokens_BxL = border.read(cfg.V, like, state, tokens_BxL, reset_BxL)
    x_BxLxD = self.embed(tokens_BxL)
    if not tokens_BxL.shape[1] and not self.is_initializing():
      return state, x_BxLxD
    if cfg.stream and not self.is_initializing():
      return self._learn(state, x_BxLxD, tokens_BxL, reset_BxL)

    def body(block, x_BxLxD, layer):
      state, owned = layer
      state, x_BxLxD, _ = block(state, x_BxLxD, reset_BxL, owned=owned)
      return x_BxLxD, state

    scanned = nn.scan(
      body,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=cfg.N,
      unroll=min(cfg.unroll, cfg.N),
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    layers = (None, None) if state is None else (state.blocks, state.owned)
    x_BxLxD, mixers = scanned(self.blocks, x_BxLxD, layers)
    state = None if state is None else ModelState(mixers, None, state.owned)
    return state, x_BxLxD

  def _learn(self, state, x_BxLxD, tokens_BxL, reset_BxL):
    """Blocks below the first that learns at once, the others by chunks."""
    cfg, params = self.cfg, nn.unbox(self.variables['params'])
    first = cfg.adapting[0]
    trunk = None if state is None else segments.layers(state.blocks, 0, first)
    if first:
      trunk, x_BxLxD, _ = segments.run_blocks(
        cfg,
        params['blocks'],
        Segment(0, first, None),
        trunk,
        x_BxLxD,
        reset_BxL,
        remat=True,
        owned=None if state is None else state.owned,
      )
    if state is None:
      x_BxLxD, *end = active.read_fresh(
        cfg, params, _head(cfg), x_BxLxD, tokens_BxL, reset_BxL
      )
      # for who asks with mutable=['telemetry'], see `telemetry.sown`
      self.sow('telemetry', 'levels', telemetry.by_row(*end))
      return None, axes.constrain(x_BxLxD, 'batch', 'length', 'activation')
    levels, mixers, x_BxLxD = active.read_on(
      cfg,
      params,
      _head(cfg),
      state.levels,
      segments.layers(state.blocks, first, cfg.N),
      Piece(x_BxLxD, tokens_BxL, reset_BxL),
      state.owned,
    )
    if first:
      mixers = jax.tree.map(lambda *x: jnp.concatenate(x, 0), trunk, mixers)
    return ModelState(mixers, levels, state.owned), x_BxLxD

  def logits(self, x_BxLxD):
    """The head: norm, then logits `[B, L, V]`, float32."""
    x_BxLxD = self.final_norm(x_BxLxD)
    if self.cfg.tied:
      logits = self.embed.attend(x_BxLxD)
    else:
      head_DxV = self.head.astype(self.cfg.compute_dtype)
      if x_BxLxD.shape[1] > 1:  # as in `layers.Linear`
        head_DxV = axes.gathered(head_DxV, 'embed', 'vocab')
      logits = layers.logits('bld,dv->blv', x_BxLxD, head_DxV)
    return axes.constrain(logits, 'batch', 'length', 'vocab')


def _head(cfg: ModelConfig):
  """The head as a function of parameters and stream, outside of any module."""
  model = LanguageModel(cfg, parent=None)
  return lambda params, x: model.apply({'params': params}, x, method='logits')


def flush(cfg: ModelConfig, params, state: ModelState) -> ModelState:
  """Learns from the tokens that wait for their chunk to fill, at once.

  Without levels that learn the state comes back as it is.
  """
  if not cfg.stream:
    return state
  border.bare(params)
  params = nn.unbox(params)
  mixers = segments.layers(state.blocks, cfg.adapting[0], cfg.N)
  levels = active.flush(
    cfg, params, _head(cfg), state.levels, mixers, state.owned
  )
  return state._replace(levels=levels)


def inner_rates(cfg: ModelConfig, params) -> tuple[jax.Array, ...]:
  """Inner learning rates of each period, fastest first, one a block."""
  border.bare(params)
  return active.rates(cfg, params) if cfg.stream else ()


def abstract_params(cfg: ModelConfig):
  """Shapes of the parameters, boxed with their logical axes; allocates none."""
  return abstract(LanguageModel(cfg))


def abstract(model: nn.Module):
  """`abstract_params` of anything with `init(key, state, tokens)`."""
  # a tree of its own for everyone who asks
  return jax.tree.map(lambda x: x, _abstract(model))


@functools.lru_cache(maxsize=64)
def _abstract(model: nn.Module):
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  # a key by its shape too: devices may be elsewhere
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(
    lambda key, t: model.init(key, None, t)['params'], key, tokens
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
  if cfg.rule:
    flops -= 2.0 * cfg.N * cfg.H * _memory_size(cfg)  # counted per token below
    flops += cfg.N * cfg.H * cost.flops_per_token(cfg.rule, K)
  if cfg.attends:
    seen = min(length / 2, cfg.window or length)
    if cfg.family == 'titans_mac':
      seen = cfg.rule.chunk_mem  # half of what is recalled, and of the segment
    seen += cfg.persistent
    flops += cfg.N * cfg.H * 4.0 * seen * K
  return flops


def _memory_size(cfg: ModelConfig) -> int:
  """Parameters of one head that are initial values of its memories."""
  if not FAMILY[cfg.family].initial:
    return 0
  K, F = cfg.head_width, cfg.head_width * cfg.rule.expansion
  return sum(
    2 * F * K if box in cfg.rule.deep else K * K for box in cfg.rule.boxes
  )
