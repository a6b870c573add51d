"""The forward kernel for TPUs: a chunk of a few heads a grid step."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import tile, tile_deep, tile_momentum
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


def saved_shapes(shape: Shape, given: Given, lead: tuple[int, ...]):
  """What the backward pass takes of a chunk, `[*lead, ...]`."""
  K, M = given.state.running.maps_KxM.shape[2:]
  dtype = jnp.dtype(shape.dtype)

  def array(rows, columns, dtype):
    return jax.ShapeDtypeStruct((*lead, rows, columns), dtype)

  def fast(maps: Maps | None):
    if maps is None:
      return None
    outer = maps.outer and {
      box: array(*x.shape[2:], dtype) for box, x in maps.outer.items()
    }
    return Maps(array(K, M, dtype), array(ROWS, K, jnp.float32), outer)

  steps = array(shape.C, M, dtype), array(ROWS, shape.C, jnp.float32)
  state, T = State(*map(fast, given.state)), array(shape.C, shape.C, dtype)
  if shape.cfg.deep:
    inverses = tile_deep.Inverses(T, dict.fromkeys(shape.cfg.deep, T))
    return tile_deep.Saved(state, inverses if shape.cfg.delta else None)
  if not shape.cfg.momentum:
    return Saved(state, T, *steps)
  if not shape.cfg.delta:
    return Saved(state, None, None, None, *steps)
  return Saved(state, T, *steps, *steps)


def _kept_shapes(shape: Shape, given: Given):
  """What is kept for the backward kernel, `[B, H, n or segments, ...]`.

  Of a segment its first state, as it is: what follows from it comes out again
  to the bit.
  """
  B, H = given.state.running.maps_KxM.shape[:2]
  if shape.stride == 1:
    return saved_shapes(shape, given, (B, H, shape.n))
  lead = (B, H, shape.segments)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*lead, *x.shape[2:]), x.dtype), given.state
  )


def forward(shape: Shape, save: bool, interpret: bool, given, stream):
  """((State, output), what is kept or None)."""
  shape = shape._replace(heads=shape.ahead)
  s = shape.stride
  specs = Specs(
    shape,
    given.state.running.maps_KxM.shape[2],
    chunk=lambda i: i,
    segment=lambda i: jax.lax.div(i, s) if s > 1 else i,
  )
  out = jax.ShapeDtypeStruct(stream.query.shape, jnp.float32)
  kept = _kept_shapes(shape, given) if save else None
  return call(
    'memory_forward_saving' if save else 'memory_forward',
    functools.partial(_forward_kernel, shape),
    shape,
    given,
    interpret,
    (given, stream),
    (specs.given(given), specs.stream(stream)),
    ((like(given.state), out), kept),
    (
      (jax.tree.map(specs.state, given.state), specs.tokens(out)),
      jax.tree.map(specs.kept, kept),
    ),
  )


def _forward_kernel(shape: Shape, given, stream, ends, kept):
  state, out = ends
  chunk = pl.program_id(2)

  @pl.when(chunk == 0)
  def _():
    jax.tree.map(copy, state, given.state)

  if kept is not None and shape.stride > 1:

    @pl.when(jax.lax.rem(chunk, shape.stride) == 0)
    def _():
      jax.tree.map(copy, kept, state)

  for p, (y, saved) in enumerate(advance(shape, given, stream, state)):
    out[0, :, lanes_of(shape, out, p)] = y
    if kept is not None and shape.stride == 1:
      put(kept, p, saved)


def advance(shape: Shape, given, stream, state):
  """Takes the state over a chunk, in place; (output, Saved) of each head."""
  cfg, dtype = shape.cfg, jnp.dtype(shape.dtype)
  walk, heads = tile_momentum if cfg.momentum else tile, []
  walk = tile_deep if cfg.deep else walk
  for p in range(shape.heads):
    slow, bias, tokens = head_of(shape, given, stream, p)
    fast = jax.tree.map(lambda ref: ref[0, p], state)  # noqa: B023
    heads.append(walk.forward_steps(cfg, slow, bias, fast, tokens, dtype))
  done = in_turn(heads)
  for p, (new, y, _) in enumerate(done):
    if new.boundary is not None:
      M, K = new.running.maps_KxM.shape[1], y.shape[1]
      due = due_of(cfg, stream.due, M, K)
      at_boundary = jax.tree.map(
        lambda d, r, b: jnp.where(d != 0, r, b), due, new.running, new.boundary
      )
      new = new._replace(boundary=at_boundary)
    put(state, p, new)
  return [(y, saved) for _, y, saved in done]
