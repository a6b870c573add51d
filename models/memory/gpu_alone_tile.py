"""A chunk of a two-layer `mem` alone on a GPU's tiles, see `gpu_alone`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import gpu_deep
from nestax.models.memory.gpu_deep import Pair
from nestax.models.memory.gpu_layout import Shape


class Both(NamedTuple):
  """Fast parts and momenta of both layers, or gradients of them."""

  fast: Pair  # [..., F, K] and [..., K, F]
  momentum: Pair | None


class Tokens(NamedTuple):
  """What chunks are written with, `[B, H, n, ...]`."""

  k: jax.Array  # [C, K]
  v: jax.Array
  eta: jax.Array  # [C] float32
  # what is left of each token's step at the chunk's end: in the fast parts,
  # and in the momenta, if any
  last: jax.Array  # [C] float32
  last_b: jax.Array | None
  # and of the chunk's start, [] float32: of the fast parts in the fast parts,
  # of the momenta in them, of the momenta in the momenta
  kept: jax.Array
  c: jax.Array | None
  b: jax.Array | None


class Given(NamedTuple):
  """What the walk starts from, float32, and which tokens count how."""

  slow: Pair  # [H, ...]
  start: Both  # [B, H, ...]
  tokens: Tokens
  # tokens whose document the chunk's start has read, [B, n, C] int32; None: all
  alive: jax.Array | None
  filled: jax.Array | None  # chunks that the tokens fill, [B, 1]


class Left(NamedTuple):
  """What queries read from, `[B, H, n, ...]`, in the matmuls' dtype."""

  start: Both  # what each chunk begins with
  r: jax.Array  # what keys are in the hidden units, [C, F]
  U_inner: jax.Array  # [C, F]
  U_outer: jax.Array  # [C, K]


class Saved(NamedTuple):
  """What the walk back needs besides."""

  m: jax.Array  # [C, F]
  e: jax.Array  # [C, K]
  norms: jax.Array  # [gpu_deep.ROWS, C], float32


class Here(NamedTuple):
  """A chunk's tokens."""

  k: jax.Array  # [C, K] in the matmuls' dtype
  v: jax.Array
  eta: jax.Array  # [C]
  last: jax.Array
  last_b: jax.Array | None
  kept: jax.Array  # scalars
  c: jax.Array | None
  b: jax.Array | None
  alive: jax.Array | None  # [C] float32


def here(given: Given, at) -> Here:
  b, h, i = at
  rows = 2, 2, 1, 1, 1, 0, 0, 0
  read = (
    None if ref is None else ref[(*at, *(slice(None),) * axes)]
    for ref, axes in zip(given.tokens, rows)
  )
  alive = None
  if given.alive is not None:
    alive = given.alive[b, i, :].astype(jnp.float32)
  return Here(*read, alive)


def part(refs: Both, at, those) -> Both:
  """Some hidden units of what a head carries."""
  return Both(*(x and gpu_deep.part(x, at, those) for x in refs))


def put_part(refs: Both, at, those, both: Both) -> None:
  for ref, x in zip(refs, both):
    if ref is not None:
      gpu_deep.put_part(ref, at, those, x)


def put_chunk(dtype, refs: Both, at, those, both: Both) -> None:
  """The same of what is written of a chunk."""
  for ref, x in zip(refs, both):
    if ref is not None:
      ref.inner[(*at, those, slice(None))] = x.inner.astype(dtype)
      ref.outer[(*at, slice(None), those)] = x.outer.astype(dtype)


def slow_part(refs: Pair, h, those) -> Pair:
  return Pair(refs.inner[h, those, :], refs.outer[h, :, those])


def units_of(ref, at, those):
  """Some columns of `[C, F]`, float32."""
  return ref[(*at, slice(None), those)].astype(jnp.float32)


def keys(shape: Shape, r, h2):
  """(gelu at r, u in the matmuls' dtype, 1 / ||h||), of some hidden units."""
  act = gpu_deep.gelu(shape.dots, r)
  return act, *gpu_deep.unit_rows(shape.dots, act.value, h2)


def pushed(chunk: Here, before: Both, inner, outer) -> Both:
  """Some hidden units after the chunk.

  Args:
    chunk: of tokens.
    before: the same units at its start.
    inner: weights -> what the tokens' steps add to the first layer by them.
    outer: likewise.
  """

  def add(x, y, kept, weights):
    return Pair(
      kept * x.inner + y.inner + inner(weights),
      kept * x.outer + y.outer + outer(weights),
    )

  nothing = Pair(0.0, 0.0)
  if before.momentum is None:
    return Both(add(before.fast, nothing, chunk.kept, chunk.last), None)
  came = jax.tree.map(lambda x: chunk.c * x, before.momentum)
  return Both(
    add(before.fast, came, chunk.kept, chunk.last),
    add(before.momentum, nothing, chunk.b, chunk.last_b),
  )


def reached(chunk: Here, both: Both, find):
  """The sum over what steps went into of `find(weights, gradients)`."""
  total = find(chunk.last, both.fast)
  if both.momentum is None:
    return total
  return total + find(chunk.last_b, both.momentum)
