"""Softmax attention with rotary angles, grouped heads and a sliding window."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestax.models import axes, fresh_attention
from nestax.models.blockwise import visible
from nestax.models.config import ModelConfig
from nestax.models.layers import LONG_AGO, Linear, rotary, segment_starts
from nestax.models.persistent import Persistent, Tokens, attend

BY_LENGTH = ('batch', 'length', 'heads', None)


class AttentionState(NamedTuple):
  """A ring of the last S keys and values of each sequence."""

  key_BxSxGxK: jax.Array
  value_BxSxGxK: jax.Array
  position_BxS: jax.Array  # int32, -1 where the slot is empty
  clock_B: jax.Array  # int32, tokens read so far
  start_B: jax.Array  # int32, position at which the document began

  @staticmethod
  def axes():
    """The names of every leaf's axes."""
    ring = ('batch', 'cache', 'kv_heads', 'head_dim')
    row = ('batch',)
    return AttentionState(ring, ring, ('batch', 'cache'), row, row)


def init_state(
  cfg: ModelConfig, B: int, length: int, whole: bool = False
) -> AttentionState:
  """Empty caches for `length` tokens, or for the window if that is less.

  A stream longer than its cache sees the last `length` tokens, as with a
  window. With `whole` there is room for all of them, whatever the window.

  Raises:
    ValueError: for a length below 1.
  """
  if length < 1:
    raise ValueError(
      f'length={length}: attention needs room for at least one token; give the '
      'longest stream that must be remembered'
    )
  S = length if whole or not cfg.window else min(length, cfg.window)
  shape = (B, S, cfg.kv_heads, cfg.head_width)
  return AttentionState(
    jnp.zeros(shape, cfg.compute_dtype),
    jnp.zeros(shape, cfg.compute_dtype),
    jnp.full((B, S), -1, jnp.int32),
    jnp.zeros((B,), jnp.int32),
    jnp.zeros((B,), jnp.int32),
  )


class Attention(nn.Module):
  """`(state, x_BxLxD, reset_BxL) -> (state, y_BxLxD)`.

  Of each row the first `length_B` tokens count, or all; the others change no
  state. `aligned` says that all sequences have the same clock and that the
  ring does not wrap around inside this call. If `bare`, what the heads read,
  `[B, L, H, K]`, comes back for y.
  """

  cfg: ModelConfig
  bare: bool = False

  @nn.compact
  def __call__(
    self, state, x_BxLxD, reset_BxL=None, length_B=None, aligned=False
  ):
    cfg = self.cfg
    H, G, K, D = cfg.H, cfg.kv_heads, cfg.head_width, cfg.D
    dtype = cfg.compute_dtype

    def project(name, heads, axis):
      names = ('embed', axis, 'head_dim')
      return Linear(
        'bld,dhk->blhk', (D, heads, K), names, D, dtype=dtype, name=name
      )

    to_key = project('key', G, 'kv_heads')
    to_value = project('value', G, 'kv_heads')
    q_BxLxHxK = project('query', H, 'heads')(x_BxLxD)
    k_BxLxGxK, v_BxLxGxK = to_key(x_BxLxD), to_value(x_BxLxD)
    q_BxLxHxK = axes.constrain(q_BxLxHxK, *BY_LENGTH)
    persistent = None
    if cfg.persistent:
      tokens_1xPxD = Tokens(cfg, name='persistent')()[None]
      persistent = Persistent(
        q_BxLxHxK, to_key(tokens_1xPxD)[0], to_value(tokens_1xPxD)[0]
      )
    if state is None:
      o_BxLxHxK = self._fresh(
        q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, persistent, reset_BxL
      )
      o_BxLxHxK = axes.constrain(o_BxLxHxK, *BY_LENGTH)
    else:
      state, o_BxLxHxK = self._continued(
        state,
        (q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, persistent),
        reset_BxL,
        length_B,
        aligned,
      )
    if self.bare:
      return state, o_BxLxHxK
    out = Linear(
      'blhk,hkd->bld',
      (H, K, D),
      ('heads', 'head_dim', 'embed'),
      H * K,
      gain=(2 * cfg.N) ** -0.5,
      dtype=dtype,
      name='out',
    )
    return state, out(o_BxLxHxK)

  def _fresh(self, q, k, v, persistent, reset_BxL):
    cfg = self.cfg
    B, L = q.shape[:2]
    position = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
    q, k = (rotary(x, position, cfg.rope_base) for x in (q, k))
    start = None if reset_BxL is None else segment_starts(reset_BxL)
    # Lengths that are split become heads that are; if heads do not divide, the
    # queries stay as they are.
    whole = axes.repeats('walks', cfg.H) == 1 or axes.ways('length') == 1
    read = functools.partial(fresh_attention.read, cfg.window, whole)
    if not whole:
      return read(q, k, v, start, persistent)
    if axes.repeats('walks', cfg.kv_heads) > axes.repeats('walks', cfg.H):
      again = functools.partial(jnp.repeat, repeats=cfg.H // cfg.kv_heads)
      k, v = (again(x, axis=2) for x in (k, v))
      if persistent is not None:
        query, *first = persistent
        persistent = Persistent(query, *(again(x, axis=1) for x in first))
    names = ('batch', None, 'walks', None)
    row = None if start is None else ('batch', None)
    first = None if persistent is None else Persistent(names, *[names[1:]] * 2)
    sizes = {'batch': B, 'walks': cfg.H}
    return axes.by_shard(read, sizes, (names, names, names, row, first), names)(
      q, k, v, start, persistent
    )

  def _continued(
    self, state: AttentionState, inputs, reset_BxL, length_B, aligned
  ):
    cfg = self.cfg
    q, k, v, persistent = inputs
    L = q.shape[1]
    index_1xL = jnp.arange(L, dtype=jnp.int32)[None]
    position_BxL = state.clock_B[:, None] + index_1xL
    start_BxL = jnp.broadcast_to(state.start_B[:, None], position_BxL.shape)
    if reset_BxL is not None:
      inside = segment_starts(reset_BxL)
      began = state.clock_B[:, None] + inside
      start_BxL = jnp.where(inside == LONG_AGO, start_BxL, began)
    q, k = (rotary(x, position_BxL, cfg.rope_base) for x in (q, k))

    keys = jnp.concatenate([state.key_BxSxGxK, k], axis=1)
    values = jnp.concatenate([state.value_BxSxGxK, v], axis=1)
    positions = jnp.concatenate([state.position_BxS, position_BxL], axis=1)
    # An empty slot's position, -1, lies before the start of any document. What
    # the ring can hold bounds what is seen, however the stream is cut.
    capacity = state.position_BxS.shape[1]
    mask = visible(
      position_BxL[..., None],
      positions[:, None],
      start_BxL[..., None],
      min(capacity, cfg.window or capacity),
    )
    # the scores of a piece against the whole cache are cheaper to compute
    # again than to keep
    again = jax.checkpoint(attend, prevent_cse=False)
    o = again(q, keys, values, mask, persistent)
    if aligned and length_B is None:
      return self._append(state, k, v, position_BxL, start_BxL), o
    if length_B is None:
      length_B = jnp.full(state.clock_B.shape, L, jnp.int32)
    return self._remember(state, k, v, position_BxL, start_BxL, length_B), o

  def _append(self, state, k, v, position_BxL, start_BxL):
    """`_remember` where every row writes the same slots, without a scatter."""
    slot = state.clock_B[0] % state.position_BxS.shape[1]

    def put(ring, new):
      new = new.astype(ring.dtype)
      return jax.lax.dynamic_update_slice_in_dim(ring, new, slot, axis=1)

    return AttentionState(
      put(state.key_BxSxGxK, k),
      put(state.value_BxSxGxK, v),
      put(state.position_BxS, position_BxL),
      position_BxL[:, -1] + 1,
      start_BxL[:, -1],
    )

  def _remember(self, state, k, v, position_BxL, start_BxL, length_B):
    S = state.position_BxS.shape[1]
    # of more than S new tokens only the last S fit; the rest must not race.
    # What is not to be kept is sent past the end, where it is dropped.
    clock_B = state.clock_B + length_B.astype(jnp.int32)
    keep = position_BxL < clock_B[:, None]
    keep = keep & (position_BxL >= clock_B[:, None] - S)
    slot_BxL = jnp.where(keep, position_BxL % S, S)

    def put(ring, new):
      write = jax.vmap(
        lambda r, s, n: r.at[s].set(n.astype(r.dtype), mode='drop')
      )
      return write(ring, slot_BxL, new)

    last_Bx1 = jnp.maximum(length_B - 1, 0)[:, None]
    start_B = jnp.take_along_axis(start_BxL, last_Bx1, axis=1)[:, 0]
    return AttentionState(
      put(state.key_BxSxGxK, k),
      put(state.value_BxSxGxK, v),
      put(state.position_BxS, position_BxL),
      clock_B,
      jnp.where(length_B > 0, start_B, state.start_B),
    )
