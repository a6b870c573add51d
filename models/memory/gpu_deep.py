"""A chunk of a two-layer `mem` in the terms of a GPU's tiles.

`M(z) = O gelu(A z)`, A and O slow values and fast parts together. Keys,
values, gates and the system T of the keys are those of the walk over the
matrix memories, and what they need no `mem` for. With `r = A k`, `h =
gelu(r)`, `u` its unit vector and `p = h - gelu(A v)`, rows being tokens,

  e = p O^T - v,       m = e O,       b = gelu'(r) m
  Z_A = T (-eta b / gain_A - eta_g k D_A^T),    D_A = g_C D_A + Z_A^T last_k
  Z_O = T_O (-eta e / gain_O - eta_g u D_O^T),  D_O = g_C D_O + Z_O^T last_u

where T_O is the system of the keys u. This has to be walked in order; what
queries read is found afterwards, for all chunks at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_gates
from nestax.models.memory.gpu_layout import (
  Shape,
  end_of,
  marks_of,
  scalars_of,
)
from nestax.models.memory.gpu_tile import Dots
from nestax.models.memory.gpu_triton import triton

SLICE = 64  # hidden units at a time where chunks are read in any order
EPS = 1e-6
CUBE = 0.044715  # of gelu's approximation by tanh
SCALE = 0.7978845608028654  # sqrt(2 / pi)
ROWS = ('h2', 'b2', 'e2')  # squared norms of h, b and e, per token


class Pair(NamedTuple):
  """Both layers of a two-layer memory."""

  inner: jax.Array  # [..., F, K]
  outer: jax.Array  # [..., K, F]


class Written(NamedTuple):
  """A chunk as the walk of `mem` leaves it, `[B, H, n, ...]`."""

  D: Pair  # fast parts at its start
  r: jax.Array  # [C, F]
  Z_inner: jax.Array  # [C, F]
  Z_outer: jax.Array  # [C, K]
  norms: jax.Array  # [ROWS, C], float32
  # for a backward pass, else None
  r_v: jax.Array | None  # [C, F], of the values
  m: jax.Array | None  # [C, F]
  e: jax.Array | None  # [C, K]
  T: jax.Array | None  # [C, C], T_O


def width(shape: Shape) -> int:
  """F."""
  return shape.K * shape.cfg.expansion


def _tanh(dots: Dots, x):
  """Of the machine where operands are rounded anyway: exact to 2^-11."""
  if dots.interpret or dots.dtype == jnp.float32:
    return 1.0 - 2.0 / (1.0 + jnp.exp(2.0 * x))
  return triton.approx_tanh(x)


class Gelu(NamedTuple):
  """`jax.nn.gelu` and its first two derivatives."""

  value: jax.Array
  slope: jax.Array
  curve: jax.Array


def gelu(dots: Dots, x) -> Gelu:
  x2 = x * x
  t = _tanh(dots, x * (SCALE + SCALE * CUBE * x2))
  half = 0.5 + 0.5 * t
  flat = 1.0 - t * t
  y = SCALE + 3.0 * SCALE * CUBE * x2
  curve = flat * (y + x * (3.0 * SCALE * CUBE * x - t * y * y))
  return Gelu(x * half, half + 0.5 * x * flat * y, curve)


def read(dots, x, W, D, alive):
  """`x (W + D)^T`, the fast part only for tokens whose document it has read."""
  if alive is None:
    return dots.nt(x, W + D)
  return dots.nt(x, W) + alive[:, None] * dots.nt(x, D)


def read_back(dots, y, W, D, alive):
  """`y (W + D)`, the same."""
  if alive is None:
    return dots.nn(y, W + D)
  return dots.nn(y, W) + alive[:, None] * dots.nn(y, D)


def over_slices(shape: Shape, ref, at, row=None):
  """The sum of what slices left, `[B, H, slices, ...]`, or of rows of it."""
  b, h, _ = at
  parts = [
    ref[b, h, j] if row is None else ref[b, h, j, row, :]
    for j in range(slices(shape))
  ]
  return sum((x.astype(jnp.float32) for x in parts), 0.0)


class Gains(NamedTuple):
  """By what steps are divided, `[C]`, see `types.inner_gain`."""

  outer: jax.Array
  inner: jax.Array
  ratio: jax.Array  # of the inner gain, before it is held above 1


def gains(shape: Shape, h2, b2, e2) -> Gains:
  if not shape.cfg.bounded:  # by nothing
    one = jnp.ones_like(h2)
    return Gains(one, one, jnp.zeros_like(h2))
  ratio = b2 / (e2 + EPS)
  return Gains(jnp.sqrt(jnp.maximum(h2, 1.0)), jnp.maximum(ratio, 1.0), ratio)


class Here(NamedTuple):
  """What every kernel knows of a chunk."""

  gate: gpu_gates.Gates
  decay: gpu_gates.Decays
  marks: gpu_gates.Marks
  k: jax.Array  # [C, K] in the matmuls' dtype
  v: jax.Array


def here(shape: Shape, stream, walked, at) -> Here:
  b, h, i = at
  marks = marks_of(stream, at)
  gate, *_ = scalars_of(shape, walked.scalars, at)
  end = end_of(shape, walked.scalars, at, 'total')
  decay = gpu_gates.decays(gate, marks, end)
  return Here(gate, decay, marks, walked.k[b, h, i], walked.v[b, h, i])


def needed(walked, written: Written):
  """Of both walks, once they are over; the rest does not reach the kernels."""
  walked = walked._replace(T=None, D=None, D_gates=None, Z=None, Z_gates=None)
  return walked, written._replace(r_v=None, m=None, e=None, T=None)


def part(refs: Pair, at, those) -> Pair:
  """Some hidden units of what a walk carries."""
  b, h, _ = at
  return Pair(refs.inner[b, h, those, :], refs.outer[b, h, :, those])


def put_part(refs: Pair, at, those, pair: Pair) -> None:
  b, h, _ = at
  refs.inner[b, h, those, :] = pair.inner
  refs.outer[b, h, :, those] = pair.outer


def keep(shape: Shape, filled, boundary: Pair | None, refs: Pair, at) -> None:
  """Where `i` chunks fill the tokens, what is carried is the boundary.

  Args:
    shape: of the walk.
    filled: reference of how many do, `[B, 1]`.
    boundary: references, or None.
    refs: of what the walk carries.
    at: a head, and the chunk i that comes next.
  """
  if boundary is None:
    return
  b, _, i = at

  @pl.when(filled[b, 0] == i)
  def _():
    def copy(j, _):
      those = units(shape, j)
      put_part(boundary, at, those, part(refs, at, those))

    jax.lax.fori_loop(0, slices(shape), copy, None)


class Slice(NamedTuple):
  """Some hidden units, for kernels that read chunks in any order."""

  slow: Pair
  D: Pair
  units: pl.Slice


def slices(shape: Shape, size=None) -> int:
  """Into how many the hidden units fall, `size` each, SLICE if not given."""
  return max(1, width(shape) // (size or SLICE))


def units(shape: Shape, j, size=None):
  size = min(width(shape), size or SLICE)
  return pl.ds(j * size, size)


def slice_of(shape: Shape, slow: Pair, D: Pair, at, those) -> Slice:
  b, h, i = at
  return Slice(
    Pair(slow.inner[h, those, :], slow.outer[h, :, those]),
    Pair(D.inner[b, h, i, those, :], D.outer[b, h, i, :, those]),
    those,
  )


def norms_at(ref, at):
  b, h, i = at
  return [ref[b, h, i, j, :] for j in range(len(ROWS))]


def unit_rows(dots, h, h2):
  """(u in the matmuls' dtype, 1 / ||h||)."""
  scale = jax.lax.rsqrt(h2 + EPS)
  return (scale[:, None] * h).astype(dots.dtype), scale


def times(scale_C, x):
  """Rows times numbers, in the dtype of the rows."""
  return (scale_C[:, None] * x.astype(jnp.float32)).astype(x.dtype)
