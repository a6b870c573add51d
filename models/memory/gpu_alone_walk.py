"""The walk of a two-layer `mem` alone over the chunks, see `gpu_alone`.

A program is a head of a sequence, which goes over a chunk by slices of the
hidden units as in `gpu_deep_walk`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_alone_tile as tile
from nestax.models.memory import gpu_deep, gpu_steps
from nestax.models.memory.gpu_alone_tile import Both, Given, Left, Saved
from nestax.models.memory.gpu_deep import Pair
from nestax.models.memory.gpu_layout import (
  Shape,
  anchored,
  anchors,
  array,
  put,
  put_rows,
)

WARPS = 8


def walk(shape: Shape, given: Given):
  """Walks from the first chunk to the last.

  Returns:
    (Left, Saved, boundary or None, Both at the end). The boundary is wanted
    where `given.filled` is there: the fast parts after so many chunks.
  """
  B, H = given.tokens.k.shape[:2]
  make, C, K, F = array(shape, B, H), shape.C, shape.K, gpu_deep.width(shape)
  starts = Both(*(x and Pair(make(F, K), make(K, F)) for x in given.start))
  left = Left(starts, make(C, F), make(C, F), make(C, K))
  norms = make(len(gpu_deep.ROWS), C, dtype='float32')
  boundary = None
  if given.filled is not None:
    boundary = jax.tree.map(jnp.zeros_like, given.start.fast)
  (left, saved), (end, boundary) = gpu_steps.through(
    _walk_kernel, shape, (B, H),
    (given._replace(start=None), anchors(shape)),
    (left, Saved(make(C, F), make(C, K), norms)), (given.start, boundary),
    'memory_alone_walk', WARPS,
  )  # fmt: skip
  return left, saved, boundary, end


def _walk_kernel(shape: Shape, given: Given, zeros, outs, state):
  b, h = pl.program_id(0), pl.program_id(1)
  both, boundary = state

  keep = functools.partial(
    gpu_deep.keep, shape, given.filled, boundary, both.fast
  )

  def chunk(i, _):
    keep((b, h, i))
    _chunk(shape, (given, *outs, both), anchored(zeros, b, h, i))

  jax.lax.fori_loop(0, shape.n, chunk, None)
  keep((b, h, shape.n))


class _Sums(NamedTuple):
  """Over the hidden units."""

  e: jax.Array  # of the errors, [C, K]
  h2: jax.Array  # [C]


def _chunk(shape: Shape, refs, at) -> None:
  given, left, saved, _ = refs
  dots, count = shape.dots, gpu_deep.slices(shape)
  chunk = tile.here(given, at)
  row = jnp.zeros((shape.C,), jnp.float32)
  sums = jax.lax.fori_loop(
    0, count, lambda j, sums: _read(shape, refs, chunk, at, j, sums),
    _Sums(jnp.zeros((shape.C, shape.K), jnp.float32), row),
  )  # fmt: skip
  gpu_steps.settle(shape)
  e = sums.e - chunk.v.astype(jnp.float32)
  if 'mem' in shape.cfg.identity:
    e = e + chunk.k.astype(jnp.float32)
  narrow_e = e.astype(dots.dtype)

  def below(j, b2):
    those = gpu_deep.units(shape, j)
    W = given.slow.outer[at[1], :, those]
    D = refs[-1].fast.outer[(*at[:2], slice(None), those)]
    m = gpu_deep.read_back(dots, narrow_e, W, D, chunk.alive)
    b = gpu_deep.gelu(dots, tile.units_of(left.r, at, those)).slope * m
    saved.m[(*at, slice(None), those)] = m.astype(dots.dtype)
    return b2 + jnp.sum(b * b, axis=1)

  b2 = jax.lax.fori_loop(0, count, below, row)
  norms = sums.h2, b2, jnp.sum(e * e, axis=1)
  put_rows(saved.norms, at, norms)
  put(saved.e, at, e)
  gain = gpu_deep.gains(shape, *norms)
  U_outer = (-(chunk.eta / gain.outer)[:, None] * e).astype(dots.dtype)
  put(left.U_outer, at, U_outer)
  gpu_steps.settle(shape)
  known = -chunk.eta / gain.inner, sums.h2, U_outer

  def write(j, _):
    _write(shape, refs, chunk, known, at, j)

  jax.lax.fori_loop(0, count, write, None)
  gpu_steps.settle(shape)


def _read(shape: Shape, refs, chunk, at, j, sums: _Sums) -> _Sums:
  """What a slice of the hidden units is at the keys."""
  given, left, _, both_ref = refs
  dots, those = shape.dots, gpu_deep.units(shape, j)
  both = tile.part(both_ref, at, those)
  tile.put_chunk(dots.dtype, left.start, at, those, both)
  W, D = tile.slow_part(given.slow, at[1], those), both.fast
  r = gpu_deep.read(dots, chunk.k, W.inner, D.inner, chunk.alive)
  r = r.astype(dots.dtype)
  left.r[(*at, slice(None), those)] = r
  h = gpu_deep.gelu(dots, r.astype(jnp.float32)).value
  e = gpu_deep.read(dots, h, W.outer, D.outer, chunk.alive)
  return _Sums(sums.e + e, sums.h2 + jnp.sum(h * h, axis=1))


def _write(shape: Shape, refs, chunk, known, at, j) -> None:
  """A slice of the hidden units after the chunk."""
  _, left, saved, both_ref = refs
  rate, h2, U_outer = known
  dots, those = shape.dots, gpu_deep.units(shape, j)
  act, u, _ = tile.keys(shape, tile.units_of(left.r, at, those), h2)
  b = act.slope * tile.units_of(saved.m, at, those)
  U = (rate[:, None] * b).astype(dots.dtype)
  left.U_inner[(*at, slice(None), those)] = U
  new = tile.pushed(
    chunk,
    tile.part(both_ref, at, those),
    lambda weights: dots.tn(U, gpu_deep.times(weights, chunk.k)),
    lambda weights: dots.tn(U_outer, gpu_deep.times(weights, u)),
  )
  tile.put_part(both_ref, at, those, new)
