"""The blocks whose levels learn, as the active phase of `cms` reads them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestax.cms import chain, experts, fresh, objective, resume
from nestax.cms import level as levels_
from nestax.cms.level import LevelState, Theta
from nestax.cms.stream import Net, Piece, StreamState
from nestax.cms.stream import init_state as init_stream
from nestax.models import axes
from nestax.models import block as blocks
from nestax.models.config import ModelConfig


def init_levels(cfg: ModelConfig, B: int):
  """Levels that have learned nothing, one state a period, fastest first."""
  nested, last = cfg.stream.nested, len(cfg.groups) - 1
  return tuple(
    levels_.init_state(
      cfg.stream.update,
      len(group.blocks),
      B,
      cfg.D,
      cfg.schedule.levels[group.slot].F,
      nested and k < last,
    )
    for k, group in enumerate(cfg.groups)
  )


def init_state(cfg: ModelConfig, B: int, mixers) -> StreamState:
  """State of the levels; `mixers` is the fresh state of all blocks."""
  return init_stream(
    init_levels(cfg, B),
    layers(mixers, cfg.adapting[0], cfg.N),
    cfg.stream.periods[0],
    B,
    cfg.D,
    cfg.compute_dtype,
  )


def init_owned(cfg: ModelConfig, B: int) -> tuple[experts.Slots, ...] | None:
  """Masked and empty expert slots of B sequences' own, leaves `[N, B, ...]`.

  One for each level of a block; None where slots are shared, or there are none.
  The first factors of every sequence are the same, whatever B is.
  """
  if cfg.cms.scope == 'shared' or not cfg.cms.slots:
    return None
  S, D, rank = cfg.cms.slots, cfg.D, cfg.cms.rank

  def one(level):
    key = jax.random.fold_in(jax.random.key(0), level)
    slots = experts.init(key, S, D, rank, (cfg.N,))
    return jax.tree.map(
      lambda x: jnp.repeat(x[:, None], B, axis=1, total_repeat_length=B), slots
    )

  return tuple(map(one, range(len(cfg.schedule.levels))))


def owned_axes() -> experts.Slots:
  """The names of the axes of such slots."""
  slots = experts.Slots(('embed', 'memory'), ('memory', 'embed'), (), ())
  return axes.stacked(slots, 'layers', 'batch', None)


def level_axes(state: LevelState) -> LevelState:
  """The names of the axes of a level's leaves, see `axes.map_names`."""
  into, row = ('layers', 'batch', 'embed', 'mlp'), ('batch',)
  theta = Theta(into, into, ('layers', 'batch', 'mlp', 'embed'))
  kinds = {Theta: theta, type(None): None}
  return LevelState(*(kinds.get(type(part), row) for part in state))


def state_axes(state: StreamState, mixers) -> StreamState:
  """The same for the whole state; `mixers` are the names of the mixers'."""
  row = ('batch',)
  return StreamState(
    levels=tuple(map(level_axes, state.levels)),
    clock_B=row,
    skip_B=row,
    held=Piece(('batch', 'length', 'activation'), *[('batch', 'length')] * 2),
    held_B=row,
    boundary=blocks.BlockState(mixers),
    surprise_B=row,
  )


def layers(tree, start: int, stop: int):
  """Some of the blocks of a tree whose leaves are stacked by block."""
  return jax.tree.map(lambda x: x[start:stop], tree)


def layer(tree, index: int):
  """One block of a tree whose leaves are stacked by block."""
  return jax.tree.map(lambda x: x[index], tree)


def _join(*parts):
  return jnp.concatenate(parts, 0) if len(parts) > 1 else parts[0]


# parameters that are read in the dtype of the matmuls only
MULTIPLIED = ('embedding', 'head', 'kernel')
FEW = 4  # blocks of a segment up to which its chunks are read without a loop


def one_by_one(params, segment):
  """The parameters of each of a segment's blocks, where they are few.

  To pick a block by an index costs more than to read a chunk with it.
  """
  if segment.stop - segment.start > FEW:
    return params
  return [layer(params, i) for i in range(segment.start, segment.stop)]


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
    body = blocks.remat(body, cfg, n)
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


def _theta(params, slot: int, index) -> Theta:
  own = params['blocks'][f'level_{slot}']
  return Theta(*(own[name][index] for name in ('gate', 'up', 'down')))


def net(
  cfg: ModelConfig, params, head, aligned: bool, owned=None, often=True
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
  """
  options = aligned, owned, often

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
  cfg: ModelConfig, params, head, aligned, owned, often, constant=None
) -> Net:
  first, cms = cfg.adapting[0], cfg.cms
  if cms.differentiate == 'full':
    memory = dataclasses.replace(cfg.memory, twice=True)
    cfg = dataclasses.replace(cfg, memory=memory)

  def own_blocks():
    return [one_by_one(params['blocks'], s) for s in cfg.segments]

  ready = own_blocks() if often else None

  def forward(weights, mixers, piece: Piece, length_B, alive_BxL):
    x_BxLxD, states, keys = piece.x_BxLxD, [], []
    for segment, own_params in zip(cfg.segments, ready or own_blocks()):
      options = {'length_B': length_B, 'aligned': aligned, 'owned': owned}
      if segment.offset is not None:
        _, options['deltas'] = _of_segment(cfg, segment, weights)
        options['alive_BxL'] = alive_BxL
      state, x_BxLxD, seen = run_blocks(
        cfg,
        own_params,
        segment,
        layers(mixers, segment.start - first, segment.stop - first),
        x_BxLxD,
        piece.reset_BxL,
        **options,
      )
      states.append(state)
      if segment.offset is not None:
        keys.append(seen)
    states, keys = (jax.tree.map(_join, *parts) for parts in (states, keys))
    return states, x_BxLxD, keys

  def own(k, delta):
    slot, numbers = cfg.groups[k].slot, cfg.groups[k].blocks
    if len(numbers) > FEW:
      theta = _theta(params, slot, jnp.array(numbers))
      return chain.own(theta, delta, cfg.compute_dtype)
    return [
      chain.own(_theta(params, slot, at), layer(delta, i), cfg.compute_dtype)
      for i, at in enumerate(numbers)
    ]

  def whole(writes, piece: Piece):
    x_BxLxD = piece.x_BxLxD
    for segment in cfg.segments:
      options = {'owned': owned}
      if segment.offset is not None:
        periods, deltas = _of_segment(cfg, segment, writes)
        options |= {'periods': periods, 'deltas': deltas}
      _, x_BxLxD, _ = run_blocks(
        cfg, params['blocks'], segment, None, x_BxLxD, piece.reset_BxL,
        remat=True, **options,
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

  own = None if cms.keeps_inputs else own
  through = cms.objective == 'next_token'
  return Net(forward, loss, through, constant, whole, own)


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
  """
  B, L = tokens_BxL.shape
  C = cfg.stream.periods[0]
  one = blocks.init_state(cfg, B, -(-L // C) * C, whole=True)
  n = cfg.N - cfg.adapting[0]
  mixers = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (n, *x.shape)), one)
  names = blocks.BlockState(axes.stacked(one.mixer.axes(), 'layers'))
  levels = init_levels(cfg, B)
  aligned = cfg.family != 'hope' or C % cfg.memory.chunks[1] == 0
  return fresh.run(
    cfg.stream,
    net(cfg, params, head, aligned),
    rates(cfg, params),
    axes.constrain_tree(levels, tuple(map(level_axes, levels))),
    axes.constrain_tree(mixers, names),
    Piece(x_BxLxD, tokens_BxL, reset_BxL),
    remat=cfg.remat != 'none',
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
