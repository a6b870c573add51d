"""Forward and backward pass with momentum on a GPU, see `gpu_momentum`."""

from typing import NamedTuple

from nestax.models.memory import (
  gpu_backward,
  gpu_collect,
  gpu_given,
  gpu_momentum_link,
  gpu_momentum_output,
  gpu_momentum_parts,
  gpu_momentum_read,
  gpu_momentum_turn,
  gpu_momentum_walk,
)
from nestax.models.memory.gpu_layout import (
  Given,
  Shape,
  Stream,
  apart,
  lay,
  together,
)
from nestax.models.memory.gpu_momentum_walk import Both


class Saved(NamedTuple):
  """What the backward pass takes from the forward pass."""

  walked: gpu_momentum_walk.Walked
  linked: gpu_momentum_link.Linked
  both: tuple  # fast part and momentum of `mem`, [B, H, n, K, K]
  steps: gpu_momentum_output.Steps


def _split(shape: Shape, *stacks):
  """(Both without `mem`, those of `mem`)."""
  fast = [apart(shape, stack) for stack in stacks]
  rest = Both(*(x._replace(mem=None) for x in fast))
  return rest, tuple(x.mem for x in fast)


def _join(shape: Shape, rest: Both, mem):
  return [
    together(shape, x._replace(mem=of_mem)) for x, of_mem in zip(rest, mem)
  ]


def forward(shape: Shape, save: bool, given: Given, stream: Stream):
  """Walks from the first chunk to the last.

  Returns:
    ((boundary or None, running, momentum, output `[B, n C, H, K]` float32),
    Saved or None), see `gpu_forward.forward`.
  """
  slow = lay(shape, given)
  rest, mem = _split(shape, given.fast, given.momentum)
  walked, boundary, rest = gpu_momentum_walk.walk(
    shape, save, slow, rest, stream
  )
  linked, adds = gpu_momentum_link.link(shape, save, slow, stream, walked)
  both, boundary_mem, mem = gpu_momentum_link.carry(
    shape, False, linked, adds, mem, stream.filled, None
  )
  out, steps = gpu_momentum_output.output(
    shape, save, slow, stream, walked, both
  )
  if boundary is not None:
    boundary = together(shape, boundary._replace(mem=boundary_mem))
  saved = Saved(walked, linked, both, steps) if save else None
  return (boundary, *_join(shape, rest, mem), out), saved


def backward(shape: Shape, given, stream, saved, gradients):
  """Gradients of `given` and `stream`, see `gpu_backward.backward`."""
  d_boundary, d_fast, d_momentum, d_out = gradients
  slow, (d_rest, d_mem) = lay(shape, given), _split(shape, d_fast, d_momentum)
  change = None
  if d_boundary is not None:
    d_boundary = apart(shape, d_boundary)
    change, d_boundary = d_boundary.mem, d_boundary._replace(mem=None)
  walked = saved.walked
  of_mem = walked, saved.both, saved.steps
  read, d_query = gpu_momentum_read.read_back(
    shape, slow, stream, of_mem, d_out
  )
  d_both, _, d_mem = gpu_momentum_link.carry(
    shape, True, saved.linked, read.mem, d_mem, stream.filled, change
  )
  parts, d_U = gpu_momentum_parts.parts(
    shape, slow, stream, of_mem, read, d_both
  )
  left = gpu_collect.Walked(
    walked.k, walked.v, walked.scalars, walked.start.D, walked.ku
  )
  if gpu_given.covers(shape):
    sums = {}, None, None
    d_tokens, d_scalars = gpu_given.finish(shape, stream, walked, parts)
    d_logits, d_total_b = d_scalars[:, :, :, :2], d_scalars[:, :, :, 2]
  else:
    turned, d_rest = gpu_momentum_turn.turn(
      shape, slow, stream, walked, saved.linked, parts, d_rest, d_boundary
    )
    sums, d_tokens = gpu_collect.collect(shape, slow, stream, left, turned)
    d_logits, d_total_b = turned.d_logits, turned.d_total_b[:, :, :, 0]
  d_W = gpu_collect.collect_mem(shape, stream, left, d_U, d_out)
  slow = gpu_backward.of_slow(shape, sums, d_W)
  d_biases, *d_handed = gpu_backward.of_logits(shape, d_logits)
  nothing = None, None, None
  return (
    Given(*slow, d_biases, *_join(shape, d_rest, d_mem)),
    Stream(d_query, *d_tokens, *nothing, d_total_b, *d_handed),
  )
