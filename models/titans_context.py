"""Titans' memory as context, MAC (2501.00663, section 4.1).

With `M`, `p` and `y (x) m` as in `titans`, in segments of C tokens,
C = `memory.chunk_mem`:

  h = M'(q(x)), M' the memory at the segment's start
  y = attention over p, h and the segment
  M is written with y;  o = y (x) M(q(y))

Deviations. A token sees of h and of the segment what is not later than itself,
and reads M as written up to itself: as printed, both would see the future.
There are no convolutions. The memory does not read p: its learned first value
is what it knows beforehand.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestax.models import recurrence, titans
from nestax.models.config import ModelConfig
from nestax.models.gates import GateMaps
from nestax.models.hope import InitialValues
from nestax.models.layers import Linear, rotary
from nestax.models.memory import chunk, scan
from nestax.models.memory.types import MemoryState, stack_initial
from nestax.models.memory.types import init_state as init_memory
from nestax.models.persistent import Persistent, Tokens, attend


class ContextState(NamedTuple):
  """What MAC carries; C slots hold the segment so far, later ones nothing."""

  memory: MemoryState
  recalled_key_BxCxHxK: jax.Array
  recalled_value_BxCxHxK: jax.Array
  key_BxCxHxK: jax.Array
  value_BxCxHxK: jax.Array
  start_B: jax.Array  # int32, slot at which the document began, or 0

  @staticmethod
  def axes():
    """The names of every leaf's axes."""
    slots = ('batch', None, 'heads', 'head_dim')
    return ContextState(recurrence.STATE, *(slots,) * 4, ('batch',))


def init_state(cfg: ModelConfig, B: int) -> ContextState:
  """Fresh sequences at the start of a segment."""
  H, K = cfg.H, cfg.head_width
  ring = jnp.zeros((B, cfg.rule.chunk_mem, H, K), cfg.compute_dtype)
  memory = init_memory(cfg.rule, B, H, K)
  return ContextState(memory, *(ring,) * 4, jnp.zeros((B,), jnp.int32))


class Piece(NamedTuple):
  """Slots of a segment, from `offset_B` on; those not live are empty."""

  x_BxlxD: jax.Array
  reset_Bxl: jax.Array
  live_Bxl: jax.Array
  offset_B: jax.Array


class MemoryAsContext(nn.Module):
  """MAC: `(state, x_BxLxD, reset_BxL) -> (state, y_BxLxD)`."""

  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    H, K, D = cfg.H, cfg.head_width, cfg.D

    def to_heads(name):
      names = ('embed', 'heads', 'head_dim')
      return Linear(
        'bld,dhk->blhk', (D, H, K), names, D, dtype=cfg.compute_dtype, name=name
      )

    self.query, self.key, self.value = map(to_heads, ('query', 'key', 'value'))
    self.memory_query = to_heads('memory_query')
    self.memory_key = to_heads('memory_key')
    self.memory_value = to_heads('memory_value')
    self.gates = GateMaps(cfg, name='gates')
    self.initial = InitialValues(cfg, name='initial')
    self.recall = titans.from_heads(cfg, 'recall', 1.0)
    self.mix = titans.from_heads(cfg, 'mix', 1.0)
    self.out = titans.from_heads(cfg, 'out', (2 * cfg.N) ** -0.5)
    self.recall_norm = titans.norm(cfg, 'recall_norm')
    self.attention_norm = titans.norm(cfg, 'attention_norm')
    self.memory_norm = titans.norm(cfg, 'memory_norm')
    if cfg.persistent:
      self.persistent = Tokens(cfg, name='persistent')

  def __call__(
    self, state, x_BxLxD, reset_BxL=None, length_B=None, aligned=False
  ):
    B, L, _ = x_BxLxD.shape
    C = self.cfg.rule.chunk_mem
    fresh = state is None
    state = state or init_state(self.cfg, B)
    live_BxL = jnp.ones((B, L), bool)
    if length_B is not None:
      live_BxL = jnp.arange(L)[None] < length_B[:, None]
    if reset_BxL is None:
      reset_BxL = jnp.zeros((B, L), bool)
    phase_B = state.memory.position_B
    streams = (x_BxLxD, reset_BxL & live_BxL, live_BxL)
    if L == 1:
      state, y_BxLxD = self._segment(state, Piece(*streams, phase_B))
      return None if fresh else state, y_BxLxD
    aligned = fresh or aligned
    phase_B = None if aligned else phase_B
    n = -(-L // C) if aligned else -(-(L + C - 1) // C)

    def lay(x):
      x = scan.on_grid(x, phase_B, L, n * C)
      return jnp.moveaxis(x.reshape(B, n, C, *x.shape[2:]), 1, 0)

    offset_nxB = jnp.zeros((n, B), jnp.int32)
    segments = nn.scan(
      lambda module, state, piece: module._segment(state, piece),
      variable_broadcast='params',
      split_rngs={'params': False},
    )
    pieces = Piece(*map(lay, streams), offset_nxB)
    state, y_nxBxCxD = segments(self, state, pieces)
    y = jnp.moveaxis(y_nxBxCxD, 0, 1).reshape(B, n * C, -1)
    return None if fresh else state, scan.off_grid(y, phase_B, L)

  def _segment(self, state: ContextState, piece: Piece):
    """Reads slots of one segment; returns (state, y_BxlxD)."""
    cfg, memory = self.cfg, state.memory
    initial = self.initial()
    slow = stack_initial(cfg.rule, initial)
    alive_Bxl = jnp.cumsum(piece.reset_Bxl, axis=1) == 0
    query_BxlxHxK = self.memory_query(piece.x_BxlxD)
    h_BxlxHxK = _per_head(
      lambda slow, boundary, alive, q: chunk.recall(
        cfg.rule, slow, boundary, alive, q, cfg.compute_dtype
      ),
      (0, 0, None, 1),
      1,
      slow,
    )(memory.boundary, alive_Bxl, query_BxlxHxK)
    h_BxlxD = self.recall(self.recall_norm(h_BxlxHxK))
    state, y_BxlxHxK = self._attend(state, piece, h_BxlxD)
    memory, m_BxlxHxK = self._write(
      initial, slow, memory, piece, self.mix(y_BxlxHxK)
    )
    gate = jax.nn.sigmoid(self.memory_norm(m_BxlxHxK))
    y_BxlxD = self.out(self.attention_norm(y_BxlxHxK) * gate)
    full_B = (memory.position_B == 0) & piece.live_Bxl.any(1)
    start_B = jnp.where(full_B, 0, state.start_B)
    return state._replace(memory=memory, start_B=start_B), y_BxlxD

  def _attend(self, state: ContextState, piece: Piece, h_BxlxD):
    """Attention over persistent, recalled and the segment's own tokens."""
    cfg = self.cfg
    index_1xl = jnp.arange(h_BxlxD.shape[1], dtype=jnp.int32)[None]
    slot_Bxl = piece.offset_B[:, None] + index_1xl
    began_Bxl = jnp.where(piece.reset_Bxl, slot_Bxl, 0)
    start_Bxl = jnp.maximum(
      jax.lax.cummax(began_Bxl, axis=1), state.start_B[:, None]
    )

    def put(ring_BxCxHxK, new_BxlxHxK):
      at_Bxl = jnp.where(piece.live_Bxl, slot_Bxl, ring_BxCxHxK.shape[1])
      return jax.vmap(lambda r, s, n: r.at[s].set(n, mode='drop'))(
        ring_BxCxHxK, at_Bxl, new_BxlxHxK
      )

    def turned(x):
      return rotary(x, slot_Bxl, cfg.rope_base)

    plain_BxlxHxK = self.query(piece.x_BxlxD)
    rings = (
      put(state.recalled_key_BxCxHxK, turned(self.key(h_BxlxD))),
      put(state.recalled_value_BxCxHxK, self.value(h_BxlxD)),
      put(state.key_BxCxHxK, turned(self.key(piece.x_BxlxD))),
      put(state.value_BxCxHxK, self.value(piece.x_BxlxD)),
    )
    slot_C = jnp.arange(rings[0].shape[1], dtype=jnp.int32)[None, None]
    seen_BxlxC = slot_C <= slot_Bxl[..., None]
    seen_BxlxC = seen_BxlxC & (slot_C >= start_Bxl[..., None])
    persistent = None
    if cfg.persistent:
      tokens_1xPxD = self.persistent()[None]
      persistent = Persistent(
        plain_BxlxHxK, self.key(tokens_1xPxD)[0], self.value(tokens_1xPxD)[0]
      )
    y_BxlxHxK = attend(
      turned(plain_BxlxHxK),
      jnp.concatenate([rings[0], rings[2]], axis=1),
      jnp.concatenate([rings[1], rings[3]], axis=1),
      jnp.concatenate([seen_BxlxC, seen_BxlxC], axis=-1)[:, None],
      persistent,
    )
    return ContextState(state.memory, *rings, start_Bxl[:, -1]), y_BxlxHxK

  def _write(self, initial, slow, memory: MemoryState, piece: Piece, y_BxlxD):
    """Writes a segment's part into the memory and reads it at each token."""
    rule, live_Bxlx1 = self.cfg.rule, piece.live_Bxl[..., None]
    gates = self.gates(y_BxlxD)
    inputs = (
      self.memory_query(y_BxlxD),
      self.memory_key(y_BxlxD),
      self.memory_value(y_BxlxD),
      # what is not live passes by
      jnp.where(live_Bxlx1, gates.log_beta, 0.0),
      gates.eta,
      gates.log_alpha,
    )
    q, k, v, log_beta, eta, log_alpha = (jnp.moveaxis(x, 2, 1) for x in inputs)
    step = scan.batched(rule, initial, slow, self.cfg.compute_dtype)
    (boundary, running, momentum), m_BxHxlxK = step(
      (memory.boundary, memory.running, memory.momentum),
      chunk.Chunk(
        q, k, v, log_beta, piece.reset_Bxl, piece.live_Bxl, eta, log_alpha
      ),
    )
    position_B = memory.position_B + piece.live_Bxl.sum(1, dtype=jnp.int32)
    full_B = position_B == rule.chunk_mem

    def commit(boundary, running):
      full = full_B.reshape(-1, *(1,) * (running.ndim - 1))
      return jnp.where(full, running, boundary)

    boundary = jax.tree.map(commit, boundary, running)
    memory = MemoryState(
      boundary, running, momentum, position_B % rule.chunk_mem
    )
    return memory, jnp.moveaxis(m_BxHxlxK, 1, 2)


def _per_head(function, axes, out_axis, slow):
  """`function(slow, ...)` of one head over the heads and sequences."""
  heads = jax.vmap(function, axes, out_axis)
  return lambda *args: jax.vmap(lambda *args: heads(slow, *args))(*args)
