"""Forward and backward pass of a two-layer `mem` on a GPU, see `gpu_deep`.

The matrix memories are walked first, which need no `mem`, by the kernels that
walk them anyway; going back they come last.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import (
  gpu_backward,
  gpu_carry,
  gpu_collect,
  gpu_deep_output,
  gpu_deep_parts,
  gpu_deep_turn,
  gpu_deep_walk,
  gpu_forward,
  gpu_turn,
  gpu_walk,
)
from nestax.models.memory.gpu_deep import Pair, Written
from nestax.models.memory.gpu_layout import (
  Fast,
  Given,
  Shape,
  Stream,
  apart,
  lay,
  together,
)
from nestax.models.memory.types import Weights


class Saved(NamedTuple):
  """What the backward pass takes from the forward pass."""

  walked: gpu_walk.Walked
  linked: gpu_carry.Linked
  written: Written


def _rest(shape: Shape) -> Shape:
  """The walk over the matrix memories, as if `mem` were one."""
  return shape._replace(cfg=dataclasses.replace(shape.cfg, depth_mem=1))


def _split(shape: Shape, weights: Weights) -> tuple[Fast, Pair]:
  """(The matrix memories, both layers of `mem`)."""
  fast = apart(shape, weights.stack)
  return fast._replace(mem=None), Pair(fast.mem, weights.outer['mem'])


def _join(shape: Shape, rest: Fast, mem: Pair) -> Weights:
  stack = together(shape, rest._replace(mem=mem.inner))
  return Weights(stack, {'mem': mem.outer})


def _given(shape: Shape, given: Given):
  """(`Given` without `mem`, its slow values, its fast parts)."""
  stacks, pairs = [], []
  for weights in (given.stack, given.fast):
    fast, pair = _split(shape, weights)
    none = jnp.zeros((*pair.outer.shape[:-1], shape.K), jnp.float32)
    stacks.append(together(_rest(shape), fast._replace(mem=none)))
    pairs.append(pair)
  rest = given._replace(stack=stacks[0], fast=stacks[1])
  slow = jax.tree.map(lambda w: w.astype(shape.dtype), pairs[0])
  return rest, slow, pairs[1]


def forward(shape: Shape, save: bool, given: Given, stream: Stream):
  """Walks from the first chunk to the last.

  Returns:
    ((boundary or None, running, output `[B, n C, H, K]` float32), Saved or
    None), see `gpu_forward.forward`; fast parts are Weights, as in `given`.
  """
  rest, W, fast = _given(shape, given)
  over = _rest(shape)
  slow = lay(over, rest)
  walked, boundary, running = gpu_walk.walk(
    over, save, slow, apart(over, rest.fast)._replace(mem=None), stream
  )
  written, boundary_mem, mem = gpu_deep_walk.walk(
    shape, save, W, fast, stream, walked
  )
  out = gpu_deep_output.output(shape, W, stream, walked, written)
  if boundary is not None:
    boundary = _join(shape, boundary, boundary_mem)
  saved = None
  if save:
    slow = slow._replace(maps={})
    linked = gpu_carry.link(over, save, slow, stream, walked)
    saved = Saved(walked, linked, written)
  return (boundary, _join(shape, running, mem), out), saved


def backward(shape: Shape, given, stream, saved: Saved, gradients):
  """Gradients of `given` and `stream`, see `gpu_backward.backward`."""
  d_boundary, d_end, d_out = gradients
  rest, W, _ = _given(shape, given)
  over = _rest(shape)
  slow = lay(over, rest)
  walked, linked, written = saved
  d_end, d_mem = _split(shape, d_end)
  change = None
  if d_boundary is not None:
    d_boundary, change = _split(shape, d_boundary)
  read, d_query = gpu_deep_output.output_back(
    shape, W, stream, walked, written, d_out
  )
  deep, d_mem = gpu_deep_turn.turn(
    shape, W, stream, walked, written, read, d_out, d_mem, change
  )
  parts = gpu_deep_parts.parts(shape, W, stream, walked, written, read, deep)
  d_W = gpu_deep_parts.collect(
    shape, stream, walked, written, read, deep, d_out
  )
  of_rest = gpu_forward.Saved(walked, linked, None, None)
  turned, d_rest = gpu_turn.turn(
    over, slow, stream, of_rest, parts, d_end, d_boundary
  )
  D = Fast(walked.D, walked.D_gates, None)
  walked = gpu_collect.Walked(
    walked.k, walked.v, walked.scalars, D, linked.turned_k
  )
  sums, (d_key, d_value) = gpu_collect.collect(
    over, slow, stream, walked, turned
  )
  stack, rows = gpu_backward.of_slow(shape, sums, d_W.inner[None, :, None])
  d_biases = jnp.sum(turned.d_logits, axis=(0, 2, 4))
  return (
    Given(
      Weights(stack, {'mem': d_W.outer}), rows, d_biases,
      _join(shape, d_rest, d_mem),
    ),
    Stream(d_query, d_key, d_value, None, None, None),
  )  # fmt: skip
