"""The one entry to the memory recurrence; picks an implementation by shape."""

import functools
import logging

import jax
import jax.numpy as jnp

from nestax.models import axes
from nestax.models.memory import (
  handed,
  pallas_gpu,
  pallas_tpu,
  scan,
  token,
  twice,
)
from nestax.models.memory.types import (
  IMPLEMENTATIONS,
  Inputs,
  MemoryConfig,
  init_state,
  varying_as,
  wide,
)

FEW = 2  # tokens up to which the token rule is cheaper than a chunk


def _by_token(cfg: MemoryConfig, initial, state, inputs: Inputs):
  B, L, H, K = inputs.query.shape
  fresh = state is None
  if fresh:
    state = init_state(cfg, B, H, K, inputs.query.dtype)
    state = varying_as(state, (initial, inputs))
  stream = token.Token(*inputs)
  state = state._replace(
    position_B=jnp.broadcast_to(state.position_B[:, None], (B, H))
  )

  def one(initial, state, stream):
    return token.run(cfg, initial, state, stream)

  # heads are axis 1 of `[L, H, K]` inputs; a reset is the same for all heads
  per_head = token.Token(1, 1, 1, 1, None, 1, 1)
  heads = jax.vmap(one, (0, 0, per_head), (0, 1))
  state, out = jax.vmap(heads, (None, 0, 0))(initial, state, stream)
  if fresh:
    return None, out
  return state._replace(position_B=state.position_B[:, 0]), out


def _chunked(cfg: MemoryConfig, inputs: Inputs, dtype) -> str:
  """The faster of the implementations by chunks that fit."""
  # what is compiled for other machines than this asks for kernels itself
  here = axes.platform(mesh=False)
  if here not in ('tpu', 'gpu') or axes.platform() != here:
    return 'scan'
  kernels = _kernels()
  _, L, _, K = inputs.query.shape
  try:
    if kernels is pallas_gpu:
      pallas_gpu.check(cfg, cfg.chunks[0], K, dtype)
      pallas_gpu.check_tried(cfg, L)
    else:
      pallas_tpu.check_rows(cfg, L, K, dtype)
  except kernels.DoesNotFit as reason:
    say_once(f'the memory runs by lax.scan, not in kernels: {reason}')
    return 'scan'
  return 'pallas'


def _kernels():
  """Those of the machine; a TPU's where neither is, to be interpreted."""
  on_gpu = axes.platform(mesh=False) == 'gpu'
  return pallas_gpu if on_gpu else pallas_tpu


@functools.cache
def say_once(words: str) -> None:
  """Warns in the log, of every words once a process."""
  logging.getLogger(__name__).warning(words)


def run(
  cfg: MemoryConfig,
  initial,
  state,
  inputs: Inputs,
  *,
  dtype=jnp.float32,
  implementation: str | None = None,
  length_B=None,
  aligned: bool = False,
):
  """Runs the self-referential memory over a piece of a stream.

  Args:
    cfg: the rule.
    initial: slow initial values, leaves with a leading `[H]` (see
      `types.stack_initial`).
    state: MemoryState of the sequences, or None for fresh ones whose end
      state nobody needs.
    inputs: slow projections `[B, L, H, K]`, L at least 1.
    dtype: of the matmuls' operands; states, gates and sums are float32. The
      token rule computes in float32 throughout.
    implementation: 'token', 'scan', 'pallas' (a GPU's kernels or a TPU's; the
      latter interpreted, and slow, where there is neither), or None to pick
      by length, shape and machine.
    length_B: tokens of each row that count, the first ones; the others change
      no state, and their outputs mean nothing. None for all; not with 'token'.
    aligned: every sequence is known to stand at a boundary of both chunks,
      which spares a shift and, on a GPU, a first chunk by scan.

  Returns:
    (MemoryState or None, output [B, L, H, K] float32).

  Raises:
    ValueError: for an unknown implementation, `length_B` with 'token', what
      the kernels do not cover with 'pallas', gates handed in that `cfg.given`
      and `cfg.momentum` do not ask for, or not handed in that they do, and
      arrays of other shapes or types (see `handed`).
  """
  handed.check(cfg, initial, state, inputs, length_B)
  inputs = handed.bounded(inputs)
  if implementation is None:
    few = inputs.query.shape[1] <= FEW and length_B is None
    implementation = 'token' if few else _chunked(cfg, inputs, dtype)
  if implementation == 'token':
    if length_B is not None:
      raise ValueError("the token rule reads whole rows: length_B needs 'scan'")
    inputs = jax.tree.map(
      lambda x: x if x.dtype == jnp.bool_ else wide(x), inputs
    )
    return _by_token(cfg, initial, state, inputs)
  if implementation == 'scan':
    return scan.run(cfg, initial, state, inputs, dtype, length_B, aligned)
  if implementation == 'pallas':
    run_kernels = _kernels().run
    if cfg.twice:
      run_kernels = functools.partial(twice.run, run_kernels)
    return run_kernels(cfg, initial, state, inputs, dtype, length_B, aligned)
  raise ValueError(
    f'implementation={implementation!r}: one of {IMPLEMENTATIONS} or None'
  )
