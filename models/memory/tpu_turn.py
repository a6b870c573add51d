"""One chunk of the walk back in the TPU kernels."""

import jax
import jax.numpy as jnp

from nestax.models.memory import tile_backward, tile_deep_backward
from nestax.models.memory.steps import in_turn
from nestax.models.memory.tile_front import State
from nestax.models.memory.tpu_grid import copy, due_of, head_of, lanes_of, put
from nestax.models.memory.tpu_layout import Given, Shape


def begin(totals, starts):
  """Sets what a walk adds to as it is at the end of the stream."""
  d_state, *sums = totals
  jax.tree.map(copy, d_state, starts)
  for ref in jax.tree.leaves(sums):
    ref[...] = jnp.zeros_like(ref)


def _before_commit(due, d_state: State) -> State:
  """Gradients before what is due was committed."""
  d_boundary, d_running, _ = d_state
  return d_state._replace(
    boundary=jax.tree.map(lambda d, b: (1 - d) * b, due, d_boundary),
    running=jax.tree.map(lambda d, r, b: r + d * b, due, d_running, d_boundary),
  )


def turn(shape: Shape, given, stream, kept, i, d_out, totals, outs):
  """Walks back over a chunk, of which `kept[i]` is what its forward pass left.

  Args:
    given: (slow values, bias).
    totals: gradients of the state, of slow values, of logits: in place.
    outs: gradients of the stream.
  """
  d_state, d_slow, d_logit = totals
  cfg, dtype = shape.cfg, jnp.dtype(shape.dtype)
  without_state, heads = Given(*given, None), []
  for p in range(shape.heads):
    slow, bias, tokens = head_of(shape, without_state, stream, p)
    lanes = lanes_of(shape, d_out, p)
    saved = jax.tree.map(lambda ref: ref[i, p], kept)  # noqa: B023
    of_state = jax.tree.map(lambda ref: ref[0, p], d_state)  # noqa: B023
    if of_state.boundary is not None:
      M, K = of_state.running.maps_KxM.shape[1], lanes.stop - lanes.start
      of_state = _before_commit(due_of(cfg, stream.due, M, K), of_state)
    heads.append((slow, bias, saved, tokens, of_state, d_out[0, :, lanes]))
  if cfg.deep:
    done = tile_deep_backward.backward(cfg, heads, dtype)
  else:
    steps = tile_backward.backward_steps
    done = in_turn([steps(cfg, *head, dtype) for head in heads])
  for p, (of_state, of_slow, of_logit, of_tokens) in enumerate(done):
    put(d_state, p, of_state)
    total = jax.tree.map(
      lambda ref, x: ref[0, p] + x,  # noqa: B023
      (d_slow, d_logit),
      (of_slow, of_logit),
    )
    put((d_slow, d_logit), p, total)
    if outs.handed is not None:
      outs.handed[0, p] = of_tokens.handed_RxC
    for ref, value in zip(outs[:3], of_tokens):
      ref[0, :, lanes_of(shape, ref, p)] = value.astype(ref.dtype)
