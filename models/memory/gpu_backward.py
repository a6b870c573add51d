"""The backward pass on a GPU, from the end to the front.

First `mem`, whose gradients need no other's: what the output sends to each
chunk's, then the walk back over them; with those, what reaches the tokens by
way of `mem`. Then the walk back over the memories that keys, values and gates
are read from; then the slow values and the inputs.
"""

import jax
import jax.numpy as jnp

from nestax.models.memory import (
  gpu_carry,
  gpu_collect,
  gpu_given,
  gpu_parts,
  gpu_turn,
)
from nestax.models.memory.gpu_layout import (
  Fast,
  Given,
  Shape,
  Stream,
  apart,
  lay,
  together,
)
from nestax.models.memory.types import GATES


def backward(shape: Shape, given, stream, saved, gradients):
  """Gradients of `given` and `stream`.

  Args:
    shape: of the walk.
    given: what the walk started from.
    stream: inputs.
    saved: of the forward pass.
    gradients: of the boundary (None where it is), the end and the output.
  """
  d_boundary, d_end, d_out = gradients
  slow, d_end = lay(shape, given), apart(shape, d_end)
  change = None
  if d_boundary is not None:
    d_boundary = apart(shape, d_boundary)
    change, d_boundary = d_boundary.mem, d_boundary._replace(mem=None)
  d_mem, d_rhs = gpu_parts.by_output(shape, stream, saved, d_out)
  d_mem, _, d_first = gpu_carry.carry(
    shape, True, saved.linked, d_mem, d_end.mem, stream.filled, change
  )
  parts, d_query, d_rhs = gpu_parts.parts(
    shape, slow, stream, saved, d_rhs, d_mem, d_out
  )
  walked = saved.walked
  walked = gpu_collect.Walked(
    walked.k,
    walked.v,
    walked.scalars,
    Fast(walked.D, walked.D_gates, None),
    saved.linked.turned_k,
  )
  if gpu_given.covers(shape):
    sums, d_fast = ({}, None, None), Fast({}, None, None)
    d_tokens, d_logits = gpu_given.finish(shape, stream, walked, parts)
  else:
    turned, d_fast = gpu_turn.turn(
      shape, slow, stream, saved, parts, d_end._replace(mem=None), d_boundary
    )
    sums, d_tokens = gpu_collect.collect(shape, slow, stream, walked, turned)
    d_logits = turned.d_logits
  d_W = gpu_collect.collect_mem(shape, stream, walked, d_rhs, d_out)
  d_fast = together(shape, d_fast._replace(mem=d_first))
  d_biases, *d_handed = of_logits(shape, d_logits)
  nothing = (None,) * 4
  return (
    Given(*of_slow(shape, sums, d_W), d_biases, d_fast),
    Stream(d_query, *d_tokens, *nothing, *d_handed),
  )


def of_slow(shape: Shape, sums, d_W):
  """Of the slow stack and the gates' rows, from sums by groups of chunks."""
  (maps, gates, rows), mem = jax.tree.map(
    lambda x: jnp.sum(x, axis=(0, 2)), (sums, d_W)
  )
  if rows is not None:
    rows = jnp.moveaxis(rows[..., : len(GATES)], -1, -2)
  return together(shape, Fast(maps, gates, mem)), rows


def of_logits(shape: Shape, d_logits):
  """Of the gates' biases, and of each gate that is handed in; else None."""
  biases = jnp.sum(d_logits, axis=(0, 2, 4)) if shape.own_gates else None
  handed = (
    d_logits[:, :, :, j] if gate in shape.cfg.given else None
    for j, gate in enumerate(GATES)
  )
  return biases, *handed
