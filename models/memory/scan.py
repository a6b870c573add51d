"""The memory over a whole stream: `lax.scan` of `chunk_step`.

The scan runs on the grid of `MemoryConfig.step`. A stream that was cut inside a
chunk is laid back on the grid: each sequence's tokens are shifted by its own
phase, and the empty places before and after are padding that changes nothing.
"""

import jax
import jax.numpy as jnp

from nestax.models.memory.chunk import chunk_step
from nestax.models.memory.decay import Chunk
from nestax.models.memory.token import commit
from nestax.models.memory.types import (
  Inputs,
  MemoryConfig,
  MemoryState,
  init_state,
  stack_initial,
  varying_as,
)


def on_grid(x, phase_B, L: int, length: int, fill=0):
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


def off_grid(y, phase_B, L: int):
  """The L tokens of each sequence that `on_grid` has laid out."""
  if phase_B is None:
    return y[:, :L]
  cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, L))
  return cut(y, phase_B)


def _chunks(x, n: int, heads: bool):
  """`[B, n * C, (H), ...]` to `[n, B, (H), C, ...]`."""
  B, length = x.shape[:2]
  x = x.reshape((B, n, length // n) + x.shape[2:])
  return jnp.moveaxis(x, (1, 3), (0, 2)) if heads else jnp.moveaxis(x, 1, 0)


def run(
  cfg: MemoryConfig,
  initial,
  state,
  inputs: Inputs,
  dtype,
  length_B=None,
  aligned: bool = False,
  walk=None,
):
  """Reads a stream of any length, starting at any point of a chunk.

  Args:
    cfg: the rule.
    initial: slow initial values, leaves with a leading `[H]`.
    state: MemoryState, or None for fresh sequences.
    inputs: `[B, L, H, K]` projections.
    dtype: of the matmuls' operands.
    length_B: tokens that count, the first of each row; None for all.
    aligned: every sequence is known to stand at a boundary of both chunks.
    walk: another way over the chunks than `walk_chunks`, with its
      arguments.

  Returns:
    (MemoryState, or None for fresh sequences; output [B, L, H, K] float32).
  """
  walk = walk or walk_chunks
  B, L, H, K = inputs.query.shape
  small, big = cfg.step, cfg.chunks[1]
  fresh = state is None
  kept = jnp.promote_types(dtype, jnp.float32)
  if fresh:
    state = init_state(cfg, B, H, K, kept)
    state = varying_as(state, (initial, inputs))
  aligned = fresh or aligned
  phase_B = None if aligned else state.position_B % small
  n = -(-L // small) if aligned else -(-(L + small - 1) // small)
  length = n * small
  slow = stack_initial(cfg, initial)

  live = None
  if not aligned or length > L or length_B is not None:
    live = jnp.ones((B, L), bool)
    if length_B is not None:
      live = jnp.arange(L)[None] < length_B[:, None]
      inputs = _silenced(inputs, live)
    live = on_grid(live, phase_B, L, length, False)
    live = _chunks(live, n, heads=False)

  def lay(x, heads):
    if x is None:
      return None
    return _chunks(on_grid(x, phase_B, L, length), n, heads)

  xs = Chunk(
    lay(inputs.query, True),
    lay(inputs.key, True),
    lay(inputs.value, True),
    lay(inputs.log_beta, True) if cfg.momentum else None,
    lay(inputs.reset, False),
    live,
    lay(inputs.eta, True),
    lay(inputs.log_alpha, True),
  )
  # on a fresh grid with equal chunks the boundary is the running value
  together = fresh and small == big and not cfg.running
  count = L if length_B is None else length_B
  first_B = state.position_B if aligned else state.position_B - phase_B
  ends_nxB = _ends(first_B, phase_B, n, small, count)
  carry = (
    None if together else state.boundary,
    state.running,
    state.momentum,
  )
  carry, out_nxBxHxCxK = walk(cfg, initial, slow, carry, xs, ends_nxB, dtype)
  out = jnp.moveaxis(out_nxBxHxCxK, (0, 2), (1, 3)).reshape(B, length, H, K)
  out = off_grid(out, phase_B, L)
  if fresh:
    return None, out
  position_B = (state.position_B + count) % big
  return MemoryState(*carry, position_B), out


def _silenced(inputs: Inputs, live_BxL) -> Inputs:
  """Keeps what does not count from decaying a momentum or forgetting."""
  log_beta, reset = inputs.log_beta, inputs.reset
  if log_beta is not None:
    log_beta = jnp.where(live_BxL[..., None], log_beta, 0.0)
  if reset is not None:
    reset = reset & live_BxL
  return inputs._replace(log_beta=log_beta, reset=reset)


def _ends(first_B, phase_B, n: int, small: int, count):
  """Position `[n, B]` at which each chunk ends; 1 where tokens do not fill it.

  An unfilled chunk is one of more than one token: 1 ends no chunk.
  """
  stop_nx1 = (jnp.arange(n, dtype=jnp.int32) + 1)[:, None] * small
  last_B = jnp.broadcast_to(count, first_B.shape)
  last_B = last_B if phase_B is None else phase_B + last_B
  return jnp.where(stop_nx1 <= last_B[None], first_B[None] + stop_nx1, 1)


def walk_chunks(cfg, initial, slow, carry, xs: Chunk, ends_nxB, dtype):
  """Scans `chunk_step` over `[n, B, ...]` chunks.

  Args:
    carry: (boundary, running, momentum); boundary None where it is the running
      value at every chunk's start.
    ends_nxB: see `_ends`.

  Returns:
    (carry, output [n, B, H, C, K]).
  """
  step = batched(cfg, initial, slow, dtype)
  together = carry[0] is None

  def body(carry, chunk_and_end):
    chunk, end_B = chunk_and_end
    boundary, running, momentum = carry
    if together:
      boundary = running
    (boundary, running, momentum), out = step(
      (boundary, running, momentum), chunk
    )
    if together:
      boundary = None
    else:
      boundary = _commit(cfg, boundary, running, end_B)
    return (boundary, running, momentum), out

  if cfg.remat:
    body = jax.checkpoint(body, prevent_cse=False)
  return _in_segments(body, cfg.stride, carry, (xs, ends_nxB))


def _in_segments(body, stride: int, carry, xs):
  """`lax.scan` that keeps every `stride`-th carry for the backward pass."""
  n = len(jax.tree.leaves(xs)[0])
  stride = min(stride, n)

  def segment(carry, xs):
    return jax.lax.scan(body, carry, xs)

  if stride == 1:
    return segment(carry, xs)
  whole = n - n % stride
  segments = jax.tree.map(
    lambda x: x[:whole].reshape((-1, stride) + x.shape[1:]), xs
  )
  walk = jax.checkpoint(segment, prevent_cse=False)
  carry, out = jax.lax.scan(walk, carry, segments)
  out = out.reshape((whole,) + out.shape[2:])
  if whole == n:
    return carry, out
  rest = jax.tree.map(lambda x: x[whole:], xs)
  carry, more = jax.checkpoint(segment)(carry, rest)
  return carry, jnp.concatenate([out, more])


def _commit(cfg, boundary, running, end_B):
  """Commits where a chunk that the tokens have filled ends at `end_B`."""
  over_heads = jax.vmap(lambda b, r, e: commit(cfg, b, r, e), (0, 0, None))
  return jax.vmap(over_heads)(boundary, running, end_B)


def batched(cfg, initial, slow, dtype):
  """`chunk_step` over sequences and heads."""

  def one(initial, slow, state, chunk):
    return chunk_step(cfg, initial, slow, state, chunk, dtype)

  per_head = Chunk(0, 0, 0, 0, None, None, 0, 0)
  heads = jax.vmap(one, (0, 0, 0, per_head))
  return lambda state, chunk: jax.vmap(heads, (None, None, 0, 0))(
    initial, slow, state, chunk
  )
