"""One block: a mixer, then a continuum of levels, all `(state, x) -> ...`."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nestax.cms import chain, experts
from nestax.cms.level import Own, Theta, Writes
from nestax.models import (
  attention,
  axes,
  hope,
  linear_rnn,
  titans,
  titans_context,
)
from nestax.models.config import ModelConfig
from nestax.models.layers import RMSNorm
from nestax.models.memory.types import SAVED


class BlockState(NamedTuple):
  """What the mixer of one block carries for every sequence."""

  mixer: (
    hope.TitanState
    | attention.AttentionState
    | linear_rnn.LinearState
    | titans.BothState
    | titans_context.ContextState
  )


# what mixes tokens in a block; linear_rnn.LinearRNN in all other families
MIXERS = {
  'hope': hope.SelfModifyingTitan,
  'hope_attention': attention.Attention,
  'transformer': attention.Attention,
  'titans_mac': titans_context.MemoryAsContext,
  'titans_mag': titans.MemoryAsGate,
  'titans_mal': titans.MemoryAsLayer,
}


def init_state(
  cfg: ModelConfig, B: int, length: int, whole: bool = False
) -> BlockState:
  """Fresh sequences; `length` and `whole` are those of an attention cache."""
  if cfg.family in ('hope_attention', 'transformer'):
    return BlockState(attention.init_state(cfg, B, length, whole))
  if cfg.family in ('titans_mag', 'titans_mal', 'samba'):
    return BlockState(titans.init_both(cfg, B, length, whole))
  if cfg.family == 'titans_mac':
    return BlockState(titans_context.init_state(cfg, B))
  module = hope if cfg.family == 'hope' else linear_rnn
  return BlockState(module.init_state(cfg, B))


class ExpertSlots(nn.Module):
  """Room for what sleep grows into a level; all masked and empty at first."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self) -> experts.Slots:
    S, r, D = self.cfg.cms.slots, self.cfg.cms.rank, self.cfg.D

    def one(name, names, shape, init=nn.initializers.zeros):
      init = nn.with_logical_partitioning(init, names)
      return self.param(name, init, shape, jnp.float32)

    first = nn.initializers.normal(D**-0.5)
    return experts.Slots(
      one('a', (None, 'embed', 'memory'), (S, D, r), first),
      one('b', (None, 'memory', 'embed'), (S, r, D)),
      one('logit', (None,), (S,)),
      one('active', (None,), (S,)),
    )


class Level(nn.Module):
  """One level of the continuum: a pre-norm MLP of hidden width F.

  Call: `(x_BxLxD, delta, alive_BxL) -> (y_BxLxD, key_BxLxD)`, without the
  residual. The weights here are the slow `theta_0`; `delta` is what each
  sequence has written on them, its `Own` weights with it, or None for an
  ordinary MLP. With a `period` it is the `Writes` of all periods that are
  read. The active expert slots add to either: those of the parameters, or
  `owned`, each sequence's own. `key` is the normalised input.
  """

  cfg: ModelConfig
  F: int

  @nn.compact
  def __call__(
    self,
    x_BxLxD,
    delta: Theta | Own | Writes | None = None,
    alive_BxL=None,
    owned=None,
    period: int = 0,
  ):
    cfg, F, D = self.cfg, self.F, self.cfg.D

    def kernel(name, shape, names, std):
      init = nn.initializers.normal(std)
      return self.param(
        name, nn.with_logical_partitioning(init, names), shape, jnp.float32
      )

    wide, back = ('embed', 'mlp'), ('mlp', 'embed')
    theta = Theta(
      kernel('gate', (D, F), wide, D**-0.5),
      kernel('up', (D, F), wide, D**-0.5),
      kernel('down', (F, D), back, (2 * cfg.N * F) ** -0.5),
    )
    if cfg.cms.objective == 'reconstruction' and cfg.stream:
      one = nn.initializers.ones
      self.param(
        'value',
        nn.with_logical_partitioning(one, ('activation',)),
        (D,),
        jnp.float32,
      )
    norm = RMSNorm(
      (D,),
      ('activation',),
      dtype=cfg.compute_dtype,
      epsilon=cfg.epsilon,
      name='norm',
    )
    key_BxLxD = norm(x_BxLxD)
    if delta is None:
      theta = jax.tree.map(lambda w: w.astype(cfg.compute_dtype), theta)
      if x_BxLxD.shape[1] > 1:  # as in `layers.Linear`
        names = wide, wide, back
        theta = Theta(*(axes.gathered(w, *n) for w, n in zip(theta, names)))
      y_BxLxD = chain.read(theta, key_BxLxD, cfg.compute_dtype)
    elif period:
      y_BxLxD = chain.read_writes(
        theta, delta, key_BxLxD, cfg.compute_dtype, period, alive_BxL
      )
    else:
      y_BxLxD = chain.read_fast(
        theta, delta, key_BxLxD, cfg.compute_dtype, alive_BxL
      )
    if cfg.cms.slots:
      slots = ExpertSlots(cfg, name='slots')()
      slots = slots if owned is None else owned
      y_BxLxD += experts.read(slots, key_BxLxD, cfg.compute_dtype)
    return y_BxLxD, key_BxLxD


class Block(nn.Module):
  """`(state, x_BxLxD, reset_BxL) -> (state, x_BxLxD, keys)`.

  A mixer, then the levels. A block of Samba (arXiv 2406.07522) is four layers:
  a recurrence (Mamba-2's), an MLP, attention over a window, an MLP.

  In a network of one's own a block is a layer: its levels learn only by what is
  handed in as `deltas`, which `models.active` does in a language model. A state
  is made by `init_state`.

  `state` may be None for fresh sequences. `length_B` and `aligned` are those
  of the mixers; `deltas`, `alive_BxL` and `owned` those of the levels, one
  delta and the sequences' own slots each, or None. With `periods`, one a
  level, `x` starts fresh sequences and deltas are `Writes`. `keys` are the
  levels' inputs where the config needs them, else (). `part` is 'mixer' for
  all before the levels, 'levels' for them alone, given what that has made.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self,
    state,
    x_BxLxD,
    reset_BxL=None,
    length_B=None,
    aligned=False,
    deltas=None,
    alive_BxL=None,
    owned=None,
    periods=None,
    part='',
  ):
    cfg = self.cfg
    if x_BxLxD.ndim != 3 or x_BxLxD.shape[-1] != cfg.D:
      raise ValueError(
        f'a block reads [B, L, D={cfg.D}], not an array of {x_BxLxD.shape}'
      )
    x_BxLxD = checkpoint_name(x_BxLxD, INPUT)
    if part != 'levels':
      options = reset_BxL, length_B, aligned
      state, x_BxLxD = self._before_levels(state, x_BxLxD, options)
    if part == 'mixer':
      return state, x_BxLxD, ()
    if periods is None:
      periods, alive = [0] * len(cfg.schedule.levels), lambda period: alive_BxL
    else:
      alive = lambda period: _alive(reset_BxL, period)  # noqa: E731
    x_BxLxD, keys = self._levels(x_BxLxD, deltas, alive, owned, periods)
    x_BxLxD = axes.constrain(x_BxLxD, 'batch', 'length', 'activation')
    return state, x_BxLxD, keys

  def _before_levels(self, state, x_BxLxD, options):
    cfg = self.cfg
    inner = None if state is None else state.mixer
    if cfg.family == 'samba':
      memory, attended = inner or (None, None)
      recurrence = linear_rnn.LinearRNN(cfg, name='recurrence')
      memory, x_BxLxD = self._mixed(recurrence, memory, x_BxLxD, options)
      x_BxLxD += Level(cfg, cfg.F, name='between')(x_BxLxD)[0]
      attend = attention.Attention(cfg, name='mixer')
      attended, x_BxLxD = self._mixed(attend, attended, x_BxLxD, options)
      inner = titans.BothState(memory, attended)
    else:
      mixer = MIXERS.get(cfg.family, linear_rnn.LinearRNN)(cfg, name='mixer')
      inner, x_BxLxD = self._mixed(mixer, inner, x_BxLxD, options)
    return None if state is None else BlockState(inner), x_BxLxD

  def _mixed(self, mixer, state, x_BxLxD, options):
    cfg = self.cfg
    norm = RMSNorm(
      (cfg.D,),
      ('activation',),
      dtype=cfg.compute_dtype,
      epsilon=cfg.epsilon,
      name=f'{mixer.name}_norm',
    )
    state, y_BxLxD = mixer(state, norm(x_BxLxD), *options)
    x_BxLxD = axes.constrain(x_BxLxD + y_BxLxD, 'batch', 'length', 'activation')
    return state, x_BxLxD

  def _levels(self, x_BxLxD, deltas, alive, owned, periods):
    cfg, keys = self.cfg, []

    def level(i, F):
      module = Level(cfg, F, name=f'level_{i}')
      delta = None if deltas is None else deltas[i]
      slots = None if owned is None else owned[i]

      def run(x_BxLxD):
        y_BxLxD, key_BxLxD = module(
          x_BxLxD, delta, alive(periods[i]), slots, periods[i]
        )
        keys.append(key_BxLxD)
        return y_BxLxD

      return run

    levels = [level(i, one.F) for i, one in enumerate(cfg.schedule.levels)]
    mix_P, variant = None, cfg.cms.variant
    if not cfg.learns:
      variant = 'sequential'
    if variant == 'independent':
      init = nn.initializers.constant(cfg.cms.mix)
      mix_P = self.param(
        'mix',
        nn.with_logical_partitioning(init, ('levels',)),
        (len(levels),),
        jnp.float32,
      )
    x_BxLxD = chain.compose(variant, levels, x_BxLxD, mix_P)
    return x_BxLxD, tuple(keys) if cfg.cms.keeps_inputs else ()


def _alive(reset_BxL, period: int):
  if reset_BxL is None or not period:
    return None
  return chain.alive(reset_BxL, period)


def _kernels_saveable(primitive, *args, **params) -> bool:
  # cuDNN's attention binds its softmax sums where no name can be given
  attends = str(primitive).startswith('dot_product_attention_fwd')
  return attends or _named(primitive, *args, **params)


_named = jax.checkpoint_policies.save_only_these_names(SAVED)
# levels that are read at once have other weights in every period: a batch
_dots = jax.checkpoint_policies.save_from_both_policies(
  jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  jax.checkpoint_policies.save_only_these_names(chain.SAVED),
)
INPUT = 'block_input'
POLICIES = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[INPUT],
    offload_src='device',
    offload_dst='pinned_host',
  ),
  'dots': _dots,
  'kernels': jax.checkpoint_policies.save_from_both_policies(
    _dots, _kernels_saveable
  ),
}


def remat(block, cfg: ModelConfig, blocks: int):
  """Makes `block`'s backward pass recompute as the config says.

  Args:
    block: class of modules, or a function.
    cfg: its `remat` and `unroll`.
    blocks: as many as the loop goes over.
  """
  if cfg.remat == 'none':
    return block
  wrap = nn.remat if isinstance(block, type) else jax.checkpoint
  # without a loop, the compiler would take both computations for one
  loops = cfg.unroll < blocks
  return wrap(block, policy=POLICIES[cfg.remat], prevent_cse=not loops)
