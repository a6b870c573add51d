"""The backward kernel for TPUs where a boundary is kept every few chunks.

The last segment of chunks comes first. Each is walked twice: forward from its
boundary, leaving in VMEM what the forward kernel would have saved of every
chunk, and back. A segment of s chunks is 2 s steps of the grid; where the
stream ends inside the last one, the steps of the chunks that it lacks are idle.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nestax.models.memory.tpu_forward import advance, saved_shapes
from nestax.models.memory.tpu_grid import Specs, copy, put
from nestax.models.memory.tpu_layout import Given, Shape
from nestax.models.memory.tpu_turn import begin, turn


def steps(shape: Shape) -> tuple[int, int]:
  """Of the grid: segments, and both walks of one."""
  return shape.segments, 2 * shape.stride


def _chunk(shape: Shape, i, j):
  """The chunk of step j of the i-th segment from the end; it may lack."""
  s = shape.stride
  return _segment(shape, i) * s + jnp.where(j < s, j, 2 * s - 1 - j)


def _segment(shape: Shape, i):
  return shape.segments - 1 - i


def specs(shape: Shape, K: int) -> tuple[Specs, Specs]:
  """Of what both walks read, and of what only the walk back touches.

  The latter stands at the walk's first chunk while the other walk is on: a
  block is written back when its place changes.
  """

  def both(i, j):
    return jnp.minimum(_chunk(shape, i, j), shape.n - 1)

  def back(i, j):
    return both(i, jnp.maximum(j, shape.stride))

  def segment(i, j):
    del j
    return _segment(shape, i)

  return Specs(shape, K, both, segment), Specs(shape, K, back, segment)


def scratch(shape: Shape, given: Given):
  """In VMEM: the state `[1, P, ...]`, what each chunk leaves `[s, P, ...]`."""
  state = jax.tree.map(
    lambda x: pltpu.VMEM((1, shape.heads, *x.shape[2:]), x.dtype), given.state
  )
  saved = saved_shapes(shape, given, (shape.stride, shape.heads))
  return state, jax.tree.map(lambda x: pltpu.VMEM(x.shape, x.dtype), saved)


def kernel(
  shape, given, stream, kept, starts, d_out, totals, outs, state, saved
):
  """A step of the grid; see `tpu_backward.backward` for what it is given."""
  i, j = pl.program_id(2), pl.program_id(3)
  there = _chunk(shape, i, j) < shape.n

  @pl.when((i == 0) & (j == 0))
  def _():
    begin(totals, starts)

  @pl.when(j == 0)
  def _():
    jax.tree.map(copy, state, kept)

  @pl.when((j < shape.stride) & there)
  def _():
    slow = Given(*given, None)
    for p, (_, values) in enumerate(advance(shape, slow, stream, state)):
      put(saved, p, values, j)

  @pl.when((j >= shape.stride) & there)
  def _():
    at = 2 * shape.stride - 1 - j
    turn(shape, given, stream, saved, at, d_out, totals, outs)
