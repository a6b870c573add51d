"""The blocks whose levels learn, as the active phase of `cms` reads them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestax.cms import chain, fresh, objective, resume
from nestax.cms.level import Theta
from nestax.cms.stream import Net, Piece, StreamState
from nestax.models import axes, level_state
from nestax.models import block as blocks
from nestax.models.config import ModelConfig
from nestax.models.continuum import Segment
from nestax.models.segments import (
  FEW,
  join,
  layer,
  layers,
  one_by_one,
  run_blocks,
)

# parameters that are read in the dtype of the matmuls only
MULTIPLIED = ('embedding', 'head', 'kernel')


def _of_segment(cfg: ModelConfig, segment, weights):
  """(period, weights `[n, ...]`) of each level of a segment's blocks.

  `weights` are those of each period; of a level that never commits, 0 and
  None.
  """
  found = [(0, None)] * len(cfg.schedule.levels)
  for period, group, tree in zip(cfg.stream.periods, cfg.groups, weights):
    if segment.start in group.blocks:
      at = group.blocks.index(segment.start)
      end = at + segment.stop - segment.start
      listed = isinstance(tree, list)
      own = tree[at:end] if listed else layers(tree, at, end)
      found[group.slot] = period, own
  return tuple(zip(*found))


def _first(cfg: ModelConfig) -> Segment:
  """The first block that learns."""
  return Segment(cfg.adapting[0], cfg.adapting[0] + 1, 0)


def _but_first(segments):
  """The segments without the first block, if that was not all."""
  start, stop, offset = segments[0]
  rest = (Segment(start + 1, stop, offset + 1),) if stop - start > 1 else ()
  return (*rest, *segments[1:])


def _theta(params, slot: int, index) -> Theta:
  own = params['blocks'][f'level_{slot}']
  return Theta(*(own[name][index] for name in ('gate', 'up', 'down')))


def net(
  cfg: ModelConfig, params, head, aligned, owned=None, often=True, begun=False
) -> Net:
  """The network from the first block that learns.

  Args:
    cfg: the model.
    params: of the whole model.
    head: `(params, x_BxLxD) -> logits_BxLxV`, for the objective: what is read
      are the `x` of every token, before the head.
    aligned: chunks of the levels start at boundaries of the memories' chunks.
    owned: expert slots of the sequences' own, see `init_owned`; or None.
    often: much is read with it, so that parameters are better prepared once.
    begun: what is read is what the first block's mixer has made.
  """
  options = aligned, owned, often, begun

  def constant():
    cast = functools.partial(_cast, cfg.compute_dtype)
    still = jax.tree_util.tree_map_with_path(cast, params)
    still = jax.lax.stop_gradient(still)
    return _net(cfg, still, functools.partial(head, still), *options)

  if cfg.cms.differentiate == 'full':
    constant = None
  return _net(cfg, params, functools.partial(head, params), *options, constant)


def _cast(dtype, path, x):
  """A parameter as it is multiplied: cast once, not at every chunk."""
  return x.astype(dtype) if path[-1].key in MULTIPLIED else x


def _net(
  cfg: ModelConfig, params, head, aligned, owned, often, begun, constant=None
) -> Net:
  first, cms = cfg.adapting[0], cfg.cms
  if cms.differentiate == 'full':
    memory = dataclasses.replace(cfg.memory, twice=True)
    cfg = dataclasses.replace(cfg, memory=memory)

  segments = cfg.segments
  if begun:
    segments = (_first(cfg), *_but_first(segments))

  def apart():
    return [one_by_one(params['blocks'], s) for s in segments]

  ready = apart() if often else None

  def forward(weights, mixers, piece: Piece, length_B, alive_BxL):
    x_BxLxD, states, keys = piece.x_BxLxD, [], []
    for i, (segment, each) in enumerate(zip(segments, ready or apart())):
      options = {'length_B': length_B, 'aligned': aligned, 'owned': owned}
      if segment.offset is not None:
        _, options['deltas'] = _of_segment(cfg, segment, weights)
        options['alive_BxL'] = alive_BxL
      given = None
      if begun and i == 0:
        options['part'] = 'levels'
      else:
        at = segment.start - first - begun
        given = layers(mixers, at, at + segment.stop - segment.start)
      state, x_BxLxD, seen = run_blocks(
        cfg, each, segment, given, x_BxLxD, piece.reset_BxL, **options
      )
      states += [] if given is None else [state]
      if segment.offset is not None:
        keys.append(seen)
    if states:
      mixers = jax.tree.map(join, *states)
    return mixers, x_BxLxD, jax.tree.map(join, *keys)

  def whole(writes, piece: Piece):
    x_BxLxD = piece.x_BxLxD
    for i, segment in enumerate(segments):
      options = {'owned': owned, 'part': 'levels' if begun and not i else ''}
      if segment.offset is not None:
        periods, deltas = _of_segment(cfg, segment, writes)
        options |= {'periods': periods, 'deltas': deltas}
      _, x_BxLxD, _ = run_blocks(
        cfg, one_by_one(params['blocks'], segment), segment, None, x_BxLxD,
        piece.reset_BxL, remat=True, **options,
      )  # fmt: skip
    return x_BxLxD

  def loss(weights, x_BxLxD, keys, piece: Piece, length_B):
    B, L = piece.tokens_BxL.shape
    scored_BxL = objective.scored(piece.reset_BxL, length_B, B, L)
    count_B = scored_BxL.sum(1).astype(jnp.float32)
    sum_B = jnp.zeros((B,), jnp.float32)
    if cms.objective == 'next_token':
      sum_B += objective.next_token(head(x_BxLxD), piece.tokens_BxL, scored_BxL)
    for group, delta in zip(cfg.groups, weights):
      if not cms.keeps_inputs:
        break
      sum_B += _local(cfg, params, group, delta, keys, scored_BxL)
    return sum_B, count_B

  through, tapped = cms.objective == 'next_token', not cms.keeps_inputs
  own = _owner(cfg, params)
  return Net(forward, loss, through, constant, whole, own, tapped)


def _owner(cfg: ModelConfig, params):
  """`Net.own`; the slow weights are picked here, outside of any loop."""

  def theta(slot, numbers):
    if len(numbers) > FEW:
      return _theta(params, slot, jnp.array(numbers))
    return [_theta(params, slot, at) for at in numbers]

  thetas = [theta(group.slot, group.blocks) for group in cfg.groups]

  def own(k, delta):
    if isinstance(thetas[k], Theta):
      return chain.own(thetas[k], delta, cfg.compute_dtype)
    return [
      chain.own(one, delta and layer(delta, i), cfg.compute_dtype)
      for i, one in enumerate(thetas[k])
    ]

  return own


def _local(cfg: ModelConfig, params, group, delta, keys, scored_BxL):
  """What the levels of one period add to the objective by themselves."""
  places = jnp.array([cfg.adapting.index(i) for i in group.blocks])
  index = jnp.array(group.blocks)
  theta = _theta(params, group.slot, index)
  keys = keys[group.slot][places]
  dtype = cfg.compute_dtype
  sum_B = 0.0
  if cfg.cms.objective == 'reconstruction':
    value = params['blocks'][f'level_{group.slot}']['value'][index]

    def one(theta, delta, key_BxLxD, value_D):
      y_BxLxD = chain.read_fast(theta, delta, key_BxLxD, dtype)
      return objective.reconstruction(
        y_BxLxD, key_BxLxD, value_D[None, None], scored_BxL
      )

    sum_B += jax.vmap(one)(theta, delta, keys, value).sum(0)
  if cfg.cms.optimizer == 'dgd':
    decay = jax.vmap(lambda t, d, k: chain.decay(t, d, k, dtype))
    decay_BxL = decay(theta, delta, keys).sum(0)
    sum_B += jnp.where(scored_BxL, decay_BxL, 0.0).sum(1)
  return sum_B


def rates(cfg: ModelConfig, params):
  """Inner learning rates of each period, fastest first, `[n]` arrays."""
  log_rate_nxP = nn.unbox(params['log_rate'])
  return tuple(
    jnp.exp(
      log_rate_nxP[
        jnp.array([cfg.adapting.index(i) for i in group.blocks]), group.slot
      ]
    )
    for group in cfg.groups
  )


def read_fresh(cfg: ModelConfig, params, head, x_BxLxD, tokens_BxL, reset_BxL):
  """(x, levels, surprise) of fresh sequences, see `cms.fresh.run`.

  `x` is what the first learning block reads, and what the last block gives.
  That block's mixer waits for no level, so it reads all tokens at once.
  """
  B, L = tokens_BxL.shape
  C = cfg.stream.periods[0]
  one = blocks.init_state(cfg, B, -(-L // C) * C, whole=True)
  n = cfg.N - cfg.adapting[0] - 1
  mixers = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (n, *x.shape)), one)
  names = blocks.BlockState(axes.stacked(one.mixer.axes(), 'layers'))
  first = _first(cfg)
  _, x_BxLxD, _ = run_blocks(
    cfg, one_by_one(params['blocks'], first), first, None, x_BxLxD, reset_BxL,
    remat=True, part='mixer',
  )  # fmt: skip
  levels = level_state.init_levels(cfg, B)
  aligned = cfg.family != 'hope' or C % cfg.memory.chunks[1] == 0
  return fresh.run(
    cfg.stream,
    net(cfg, params, head, aligned, begun=True),
    rates(cfg, params),
    axes.constrain_tree(levels, tuple(map(level_state.level_axes, levels))),
    axes.constrain_tree(mixers, names),
    Piece(x_BxLxD, tokens_BxL, reset_BxL),
    remat=cfg.cms.remat,
  )


def read_on(cfg: ModelConfig, params, head, state, mixers, piece, owned=None):
  """(levels' state, mixers, x) of sequences that go on."""
  one_token = piece.tokens_BxL.shape[1] == 1
  return resume.run(
    cfg.stream,
    net(cfg, params, head, False, owned, often=not one_token),
    rates(cfg, params),
    state,
    mixers,
    piece,
  )


def flush(
  cfg: ModelConfig, params, head, state, mixers, owned=None
) -> StreamState:
  """Learns from what is pending; see `cms.resume.flush`."""
  return resume.flush(
    cfg.stream,
    net(cfg, params, head, False, owned),
    rates(cfg, params),
    state,
    mixers,
  )
