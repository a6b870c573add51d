"""The backward kernel for TPUs: the chunks of a walk in reverse."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import tpu_segments
from nestax.models.memory.tile_ops import ROWS
from nestax.models.memory.tpu_grid import Specs, call, like
from nestax.models.memory.tpu_layout import Given, Shape
from nestax.models.memory.tpu_turn import begin, turn


def backward(shape: Shape, interpret: bool, given, stream, kept, gradients):
  """Gradients of `given` and `stream`."""
  ends, d_out = gradients
  B, H, K = given.state.running.maps_KxM.shape[:3]
  logit = jax.ShapeDtypeStruct((B, H, ROWS, shape.C), jnp.float32)
  d_slow = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((B, *x.shape), jnp.float32), given.slow
  )
  d_stream = like(stream._replace(marks=None, due=None))
  if shape.stride == 1:
    specs = back = Specs(shape, K, chunk=lambda i: shape.n - 1 - i)
    kernel, steps, scratch = _backward_kernel, (shape.n,), ()
  else:
    specs, back = tpu_segments.specs(shape, K)
    kernel, steps = tpu_segments.kernel, tpu_segments.steps(shape)
    scratch = tpu_segments.scratch(shape, given)
  totals, d_stream = call(
    'memory_backward',
    functools.partial(kernel, shape),
    shape,
    given,
    interpret,
    ((given.slow, given.bias), stream, kept, ends, d_out),
    (
      (jax.tree.map(specs.slow, given.slow), specs.slow(given.bias)),
      specs.stream(stream),
      jax.tree.map(specs.kept, kept),
      jax.tree.map(specs.state, ends),
      back.tokens(d_out),
    ),
    ((like(ends), d_slow, logit), d_stream),
    (
      jax.tree.map(specs.state, (ends, d_slow, logit)),
      back.stream(d_stream),
    ),
    steps,
    scratch,
  )
  d_state, d_slow, d_logit = totals
  d_slow = jax.tree.map(lambda x: jnp.sum(x, axis=0), d_slow)
  d_bias = jnp.sum(d_logit, axis=(0, 3))[..., None]
  return Given(d_slow, d_bias, d_state), d_stream


def _backward_kernel(shape, given, stream, kept, starts, d_out, totals, outs):
  @pl.when(pl.program_id(2) == 0)
  def _():
    begin(totals, starts)

  turn(shape, given, stream, kept, 0, d_out, totals, outs)
