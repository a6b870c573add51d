"""The memory over a whole stream: `lax.scan` of `chunk_step`.

The scan runs on the grid of the smaller chunk. A stream that was cut inside a
chunk is laid back on the grid: each sequence's tokens are shifted by its own
phase, and the empty places before and after are padding that changes nothing.
"""

import jax
import jax.numpy as jnp

from nestax.models.memory.chunk import Chunk, chunk_step
from nestax.models.memory.token import commit
from nestax.models.memory.types import (
  Inputs,
  MemoryConfig,
  MemoryState,
  init_state,
  stack_initial,
)


def _on_grid(x, phase_B, L: int, length: int, fill=0):
  """`x [B, L, ...]` shifted right by each sequence's phase, `length` long."""
  if phase_B is None:
    after = ((0, 0), (0, length - L)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, after, constant_values=fill) if length > L else x
  most = length - L
  wide = ((0, 0), (most, most)) + ((0, 0),) * (x.ndim - 2)
  x = jnp.pad(x, wide, constant_values=fill)
  cut = jax.vmap(
    lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, length)
  )
  return cut(x, most - phase_B)


def _off_grid(y, phase_B, L: int):
  if phase_B is None:
    return y[:, :L]
  cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, L))
  return cut(y, phase_B)


def _chunks(x, n: int, heads: bool):
  """`[B, n * C, (H), ...]` to `[n, B, (H), C, ...]`."""
  B, length = x.shape[:2]
  x = x.reshape((B, n, length // n) + x.shape[2:])
  return jnp.moveaxis(x, (1, 3), (0, 2)) if heads else jnp.moveaxis(x, 1, 0)


def run(cfg: MemoryConfig, initial, state, inputs: Inputs, dtype):
  """Reads a stream of any length, starting at any point of a chunk.

  Args:
    cfg: the rule.
    initial: slow initial values, leaves with a leading `[H]`.
    state: MemoryState, or None for fresh sequences.
    inputs: `[B, L, H, K]` projections.
    dtype: of the matmuls' operands.

  Returns:
    (MemoryState, or None for fresh sequences; output [B, L, H, K] float32).
  """
  B, L, H, K = inputs.query.shape
  small, big = cfg.chunks
  fresh = state is None
  kept = jnp.promote_types(dtype, jnp.float32)
  state = state or init_state(cfg, B, H, K, kept)
  phase_B = None if fresh else state.position_B % small
  n = -(-L // small) if fresh else -(-(L + small - 1) // small)
  length = n * small
  slow = stack_initial(cfg, initial)

  live = None
  if not fresh or length > L:
    live = _on_grid(jnp.ones((B, L), bool), phase_B, L, length, False)
    live = _chunks(live, n, heads=False)

  def lay(x, heads):
    if x is None:
      return None
    return _chunks(_on_grid(x, phase_B, L, length), n, heads)

  xs = Chunk(
    lay(inputs.query, True),
    lay(inputs.key, True),
    lay(inputs.value, True),
    lay(inputs.log_beta, True) if cfg.momentum else None,
    lay(inputs.reset, False),
    live,
  )
  step = _batched(cfg, initial, slow, dtype)
  # on a fresh grid with equal chunks the boundary is the running value
  together = fresh and small == big

  def body(carry, chunk_and_index):
    chunk, index = chunk_and_index
    boundary, running, momentum, position_B = carry
    if together:
      boundary = running
    (boundary, running, momentum), out = step(
      (boundary, running, momentum), chunk
    )
    if not together:
      end_B = position_B + (index + 1) * small
      boundary = _commit(cfg, boundary, running, end_B, L, phase_B, index)
    return (None if together else boundary, running, momentum, position_B), out

  if cfg.remat:
    body = jax.checkpoint(body, prevent_cse=False)
  first_B = state.position_B if fresh else state.position_B - phase_B
  boundary = None if together else state.boundary
  carry = (boundary, state.running, state.momentum, first_B)
  carry, out = jax.lax.scan(
    body, carry, (xs, jnp.arange(n, dtype=jnp.int32)), length=n
  )
  boundary, running, momentum, _ = carry
  out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(B, length, H, K)
  out = _off_grid(out, phase_B, L)
  if fresh:
    return None, out
  position_B = (state.position_B + L) % big
  return MemoryState(boundary, running, momentum, position_B), out


def _commit(cfg, boundary, running, end_B, L, phase_B, index):
  """Commits where a chunk that the tokens have filled ends at `end_B`."""
  small = cfg.chunks[0]
  phase_B = 0 if phase_B is None else phase_B
  filled_B = (index + 1) * small <= phase_B + L
  # an unfilled chunk (so of more than one token) must not look like an end
  end_B = jnp.where(filled_B, end_B, 1)
  over_heads = jax.vmap(lambda b, r, e: commit(cfg, b, r, e), (0, 0, None))
  return jax.vmap(over_heads)(boundary, running, end_B)


def _batched(cfg, initial, slow, dtype):
  """`chunk_step` over sequences and heads."""

  def one(initial, slow, state, chunk):
    return chunk_step(cfg, initial, slow, state, chunk, dtype)

  per_head = Chunk(0, 0, 0, 0, None, None)
  heads = jax.vmap(one, (0, 0, 0, per_head))
  return lambda state, chunk: jax.vmap(heads, (None, None, 0, 0))(
    initial, slow, state, chunk
  )
