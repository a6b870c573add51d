"""The forward kernel for TPUs: a chunk of a few heads a grid step."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import tile, tile_momentum
from nestax.models.memory.steps import in_turn
from nestax.models.memory.tile import Saved
from nestax.models.memory.tile_front import Maps, State
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


def _saved_shapes(shape: Shape, given: Given):
  """What the forward kernel keeps for the backward one, `[B, H, n, ...]`."""
  B, H, K, M = given.state.running.maps_KxM.shape
  lead, dtype = (B, H, shape.n), jnp.dtype(shape.dtype)

  def array(rows, columns, dtype):
    return jax.ShapeDtypeStruct((*lead, rows, columns), dtype)

  def fast(maps: Maps | None):
    if maps is None:
      return None
    return Maps(array(K, M, dtype), array(ROWS, K, jnp.float32))

  steps = array(shape.C, M, dtype), array(ROWS, shape.C, jnp.float32)
  state, T = State(*map(fast, given.state)), array(shape.C, shape.C, dtype)
  if not shape.cfg.momentum:
    return Saved(state, T, *steps)
  if not shape.cfg.delta:
    return Saved(state, None, None, None, *steps)
  return Saved(state, T, *steps, *steps)


def forward(shape: Shape, save: bool, interpret: bool, given, stream):
  """((State, output), Saved or None)."""
  specs = Specs(shape, given.state.running.maps_KxM.shape[2], reverse=False)
  out = jax.ShapeDtypeStruct(stream.query.shape, jnp.float32)
  saved = _saved_shapes(shape, given) if save else None
  return call(
    'memory_forward_saving' if save else 'memory_forward',
    functools.partial(_forward_kernel, shape),
    shape,
    given,
    interpret,
    (given, stream),
    (specs.given(given), specs.stream(stream)),
    ((like(given.state), out), saved),
    (
      (jax.tree.map(specs.state, given.state), specs.tokens(out)),
      jax.tree.map(specs.saved, saved),
    ),
  )


def _forward_kernel(shape: Shape, given, stream, ends, saved):
  state, out = ends
  cfg, dtype = shape.cfg, jnp.dtype(shape.dtype)

  @pl.when(pl.program_id(2) == 0)
  def _():
    jax.tree.map(copy, state, given.state)

  forward_steps = tile_momentum if cfg.momentum else tile
  forward_steps, heads = forward_steps.forward_steps, []
  for p in range(shape.heads):
    slow, bias, tokens = head_of(shape, given, stream, p)
    fast = jax.tree.map(lambda ref: ref[0, p], state)  # noqa: B023
    heads.append(forward_steps(cfg, slow, bias, fast, tokens, dtype))
  for p, done in enumerate(in_turn(heads)):
    new, y, kept = done
    if new.boundary is not None:
      M, K = new.running.maps_KxM.shape[1], y.shape[1]
      due = due_of(cfg, stream.due, M, K)
      at_boundary = jax.tree.map(
        lambda d, r, b: jnp.where(d != 0, r, b), due, new.running, new.boundary
      )
      new = new._replace(boundary=at_boundary)
    put(state, p, new)
    out[0, :, lanes_of(shape, out, p)] = y
    if saved is not None:
      put(saved, p, kept)
