"""The backward kernel for TPUs: the chunks of a walk in reverse."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import tile_backward
from nestax.models.memory.tile_front import State
from nestax.models.memory.tile_ops import ROWS
from nestax.models.memory.tpu_grid import (
  Specs,
  call,
  copy,
  due_of,
  head_of,
  lanes_of,
  like,
  put,
)
from nestax.models.memory.tpu_layout import Given, Shape


def backward(shape: Shape, interpret: bool, given, stream, saved, gradients):
  """Gradients of `given` and `stream`."""
  specs = Specs(shape, given.state.running.maps_KxM.shape[2], reverse=True)
  ends, d_out = gradients
  B, H = given.state.running.maps_KxM.shape[:2]
  logit = jax.ShapeDtypeStruct((B, H, ROWS, shape.C), jnp.float32)
  d_slow = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((B, *x.shape), jnp.float32), given.slow
  )
  d_stream = like(stream._replace(marks=None, due=None))
  totals, d_stream = call(
    'memory_backward',
    functools.partial(_backward_kernel, shape),
    shape,
    given,
    interpret,
    ((given.slow, given.bias), stream, saved, ends, d_out),
    (
      (jax.tree.map(specs.slow, given.slow), specs.slow(given.bias)),
      specs.stream(stream),
      jax.tree.map(specs.saved, saved),
      jax.tree.map(specs.state, ends),
      specs.tokens(d_out),
    ),
    ((like(ends), d_slow, logit), d_stream),
    (
      jax.tree.map(specs.state, (ends, d_slow, logit)),
      specs.stream(d_stream),
    ),
  )
  d_state, d_slow, d_logit = totals
  d_slow = jax.tree.map(lambda x: jnp.sum(x, axis=0), d_slow)
  d_bias = jnp.sum(d_logit, axis=(0, 3))[..., None]
  return Given(d_slow, d_bias, d_state), d_stream


def _before_commit(due, d_state: State) -> State:
  """Gradients before what is due was committed."""
  d_boundary, d_running, _ = d_state
  return d_state._replace(
    boundary=jax.tree.map(lambda d, b: (1 - d) * b, due, d_boundary),
    running=jax.tree.map(lambda d, r, b: r + d * b, due, d_running, d_boundary),
  )


def _backward_kernel(shape, given, stream, saved, starts, d_out, totals, outs):
  d_state, d_slow, d_logit = totals
  cfg, dtype = shape.cfg, jnp.dtype(shape.dtype)
  given = Given(*given, None)

  @pl.when(pl.program_id(2) == 0)
  def _():
    jax.tree.map(copy, d_state, starts)
    for ref in jax.tree.leaves((d_slow, d_logit)):
      ref[...] = jnp.zeros_like(ref)

  for p in range(shape.heads):
    slow, bias, tokens = head_of(shape, given, stream, p)
    lanes = lanes_of(shape, d_out, p)
    kept = jax.tree.map(lambda ref: ref[0, p, 0], saved)  # noqa: B023
    of_state = jax.tree.map(lambda ref: ref[0, p], d_state)  # noqa: B023
    if of_state.boundary is not None:
      M, K = of_state.running.maps_KxM.shape[1], lanes.stop - lanes.start
      of_state = _before_commit(due_of(cfg, stream.due, M, K), of_state)
    of_state, of_slow, of_logit, of_tokens = tile_backward.backward(
      cfg, slow, bias, kept, tokens, of_state, d_out[0, :, lanes], dtype
    )
    put(d_state, p, of_state)
    total = jax.tree.map(
      lambda ref, x: ref[0, p] + x,  # noqa: B023
      (d_slow, d_logit),
      (of_slow, of_logit),
    )
    put((d_slow, d_logit), p, total)
    if outs.log_beta is not None:
      outs.log_beta[0, p] = of_tokens.log_beta_1xC
    for ref, value in zip(outs[:3], of_tokens):
      ref[0, :, lanes_of(shape, ref, p)] = value.astype(ref.dtype)
