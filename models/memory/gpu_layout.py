"""How the walk's arrays lie in a GPU's memory, and how kernels are called.

`N` is the rows of the stack, padded to a power of two.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from nestax.models.memory import gpu_tile
from nestax.models.memory.gpu_gates import Gates, Marks
from nestax.models.memory.gpu_tile import Dots
from nestax.models.memory.types import MemoryConfig

SCALARS = (*Gates._fields, 'k_norm', 'v_norm')


class Shape(NamedTuple):
  """What is static of a walk."""

  cfg: MemoryConfig
  dtype: str  # of the matmuls' operands
  C: int
  n: int  # chunks
  K: int
  interpret: bool

  @property
  def dots(self):
    return Dots(jnp.dtype(self.dtype), self.interpret)

  @property
  def R(self):
    return len(self.cfg.boxes) * self.K + len(self.cfg.gates)

  @property
  def N(self):
    return 1 << (self.R - 1).bit_length()

  def box(self, name: str):
    """Rows of a map on the stack."""
    return pl.ds(self.cfg.boxes.index(name) * self.K, self.K)

  def gate(self, name: str) -> int:
    """Row of a gate's memory on the stack."""
    return len(self.cfg.boxes) * self.K + self.cfg.gates.index(name)

  def barrier(self):
    """Between what a block's threads wrote and what others of it read."""
    if not self.interpret:
      plgpu.debug_barrier()


class Given(NamedTuple):
  """What a walk starts from."""

  stack: jax.Array  # slow values, [H, R, K]
  rows: jax.Array  # both gates' as their logits read them, [H, 2, K]
  biases: jax.Array  # [H, 2]
  fast: jax.Array  # the stack of fast parts, [B, H, R, K]


class Stream(NamedTuple):
  """Inputs over the stream."""

  query: jax.Array  # [B, n C, H, K]
  key: jax.Array
  value: jax.Array
  document: jax.Array | None  # [B, n, C], see `gpu_gates.Marks`
  live: jax.Array | None
  filled: jax.Array | None  # [B, 1], chunks that the tokens fill


class Slow(NamedTuple):
  """Slow values as the kernels take them, maps in the matmuls' dtype."""

  stack: jax.Array  # [H, N, K]
  folded: jax.Array  # [H, 2, N, K], ones added where targets are points
  of_value: jax.Array | None  # [2, N, K], ones on the diagonal of other maps
  of_key: jax.Array | None
  of_mem: jax.Array
  rows: jax.Array  # [H, 2, K]
  biases: jax.Array  # [H, 2]


class Saved(NamedTuple):
  """A chunk as the forward walk leaves it to the backward, `[B, H, n, ...]`."""

  D: jax.Array  # fast parts at its start, [N, K]
  k: jax.Array  # [C, K]
  v: jax.Array
  T: jax.Array | None  # [C, C]
  Z: jax.Array  # [N, C]
  scalars: jax.Array  # [SCALARS, C], float32


def pad_rows(shape: Shape, x):
  width = [(0, 0)] * x.ndim
  width[-2] = (0, shape.N - x.shape[-2])
  return jnp.pad(x, width)


def twice(x):
  """Two copies `[..., 2, N, K]`, for chunks to read in turn.

  What a loop reads again and again from one place the compiler keeps in
  registers, of which there are too few.
  """
  return None if x is None else jnp.stack([x, x], axis=-3)


def no_offsets(shape: Shape):
  """Zeros for `anchored`."""
  return jnp.zeros((shape.n,), jnp.int32)


def anchored(zeros, b, h, i):
  """A chunk's indices, for the same reason.

  Addresses that every pass has in common would be kept; one that depends on
  what was just loaded is computed when it is needed.
  """
  zero = zeros[i]
  return b + zero, h + zero, i


def lay(shape: Shape, given: Given) -> Slow:
  cfg, K = shape.cfg, shape.K
  ones = {box: jnp.eye(K, dtype=shape.dtype) for box in cfg.boxes}

  def picked(boxes):
    if not boxes:
      return None
    parts = [ones[box] * (box in boxes) for box in cfg.boxes]
    return pad_rows(shape, jnp.concatenate(parts))

  points = [box for box in cfg.boxes if gpu_tile.at_point(cfg, box)]
  others = [box for box in cfg.boxes if box not in points]
  with_key = cfg.objective == 'l2'
  keys = [box for box in others if with_key and box in cfg.identity]
  stack = pad_rows(shape, given.stack)
  folded = stack
  if points:
    folded = stack + picked(points).astype(stack.dtype)[None]
  return Slow(
    stack.astype(shape.dtype),
    twice(folded.astype(shape.dtype)),
    twice(picked(others)),
    twice(picked(keys)),
    twice(picked(['mem'])),
    given.rows,
    given.biases,
  )


def array(shape: Shape, B: int, H: int):
  """Makes shapes of arrays by chunks, `[B, H, n, ...]`."""

  def make(*tail, dtype=shape.dtype):
    return jax.ShapeDtypeStruct((B, H, shape.n, *tail), jnp.dtype(dtype))

  return make


def saved_shapes(shape: Shape, B: int, H: int) -> Saved:
  make, C, K, N = array(shape, B, H), shape.C, shape.K, shape.N
  return Saved(
    make(N, K),
    make(C, K),
    make(C, K),
    make(C, C) if shape.cfg.delta else None,
    make(N, C),
    make(len(SCALARS), C, dtype='float32'),
  )


def tokens_of(shape: Shape, x, at):
  b, h, i = at
  return x[b, pl.ds(i * shape.C, shape.C), h, :]


def put_tokens(shape: Shape, ref, at, x) -> None:
  b, h, i = at
  ref[b, pl.ds(i * shape.C, shape.C), h, :] = x.astype(ref.dtype)


def marks_of(document, live, at) -> Marks:
  b, _, i = at
  return Marks(
    None if document is None else document[b, i, :],
    None if live is None else live[b, i, :],
  )


def scalars_of(shape: Shape, saved: Saved, at):
  """(Gates, reciprocal norms of k and v, the latter None where not taken)."""
  b, h, i = at
  rows = [saved.scalars[b, h, i, j, :] for j in range(len(SCALARS))]
  *gate, k_norm, v_norm = rows
  return Gates(*gate), k_norm, v_norm if shape.cfg.value_norm else None


def put(ref, at, x) -> None:
  b, h, i = at
  ref[b, h, i, :, :] = x.astype(ref.dtype)


def call(kernel, shape: Shape, grid, args, outs, name, warps, stages):
  """A Triton kernel over whole arrays, which it indexes itself."""
  everywhere = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    functools.partial(kernel, shape),
    grid=grid,
    in_specs=jax.tree.map(lambda _: everywhere, args),
    out_specs=jax.tree.map(lambda _: everywhere, outs),
    out_shape=outs,
    interpret=shape.interpret,
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    name=name,
  )(*args)
