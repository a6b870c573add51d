"""The walk over a stream's chunks as one GPU kernel, forward.

One program is one head of one sequence: it carries the fast parts from chunk
to chunk in registers. Asked to save, it writes them down as they stood at the
start of each chunk, in the matmuls' dtype (a gate's in float32): from there
every chunk can be computed again by itself.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from nestax.models.memory import gpu_tile
from nestax.models.memory.gpu_tile import Dots, Fast, Marks, Slow
from nestax.models.memory.types import GATES, MemoryConfig

WARPS = 8
STAGES = 1


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


class Given(NamedTuple):
  """What a walk starts from."""

  maps: jax.Array  # slow values of the boxes, [H, boxes K, K]
  rows: jax.Array  # of both gates, [H, 2, K]
  biases: jax.Array  # [H, 2]
  fast: jax.Array  # the stack of fast parts, [B, H, R, K]


class Stream(NamedTuple):
  """Inputs over the stream."""

  query: jax.Array  # [B, n C, H, K]
  key: jax.Array
  value: jax.Array
  document: jax.Array | None  # [B, n, C], see `gpu_tile.Marks`
  live: jax.Array | None
  filled: jax.Array | None  # [B, 1], chunks that the tokens fill


class Saved(NamedTuple):
  """Fast parts at the start of each chunk."""

  maps: jax.Array  # [B, H, n, boxes K, K]
  rows: jax.Array | None  # [B, H, n, gates, K], float32


def slow_of(shape: Shape, maps, rows, biases, h) -> Slow:
  return Slow(
    gpu_tile.Loads(lambda box: maps[h, _rows_of(shape, box), :]),
    {gate: rows[h, j, :] for j, gate in enumerate(GATES)},
    {gate: biases[h, j] for j, gate in enumerate(GATES)},
  )


def _rows_of(shape: Shape, box: str):
  return pl.ds(shape.cfg.boxes.index(box) * shape.K, shape.K)


def fast_of(shape: Shape, stack, b, h) -> Fast:
  cfg, K = shape.cfg, shape.K
  first = len(cfg.boxes) * K
  return Fast(
    {box: stack[b, h, pl.ds(j * K, K), :] for j, box in enumerate(cfg.boxes)},
    {gate: stack[b, h, first + j, :] for j, gate in enumerate(cfg.gates)},
  )


def put_fast(shape: Shape, stack, b, h, fast: Fast) -> None:
  cfg, K = shape.cfg, shape.K
  first = len(cfg.boxes) * K
  for j, box in enumerate(cfg.boxes):
    stack[b, h, pl.ds(j * K, K), :] = fast.maps[box]
  for j, gate in enumerate(cfg.gates):
    stack[b, h, first + j, :] = fast.rows[gate]


def saved_of(shape: Shape, saved: Saved, b, h, i) -> Fast:
  maps = gpu_tile.Loads(
    lambda box: saved.maps[b, h, i, _rows_of(shape, box), :]
  )
  gates = enumerate(shape.cfg.gates)
  return Fast(maps, {gate: saved.rows[b, h, i, j, :] for j, gate in gates})


def put_saved(shape: Shape, saved: Saved, b, h, i, fast: Fast) -> None:
  cfg, K = shape.cfg, shape.K
  for j, box in enumerate(cfg.boxes):
    value = fast.maps[box].astype(saved.maps.dtype)
    saved.maps[b, h, i, pl.ds(j * K, K), :] = value
  for j, gate in enumerate(cfg.gates):
    saved.rows[b, h, i, j, :] = fast.rows[gate]


def tokens_of(shape: Shape, x, b, h, i):
  return x[b, pl.ds(i * shape.C, shape.C), h, :]


def marks_of(document, live, b, i) -> Marks:
  return Marks(
    None if document is None else document[b, i, :],
    None if live is None else live[b, i, :],
  )


def saved_shapes(shape: Shape, B: int, H: int) -> Saved:
  cfg, K = shape.cfg, shape.K
  rows = None
  if cfg.gates:
    rows = (B, H, shape.n, len(cfg.gates), K)
    rows = jax.ShapeDtypeStruct(rows, jnp.float32)
  maps = (B, H, shape.n, len(cfg.boxes) * K, K)
  return Saved(jax.ShapeDtypeStruct(maps, jnp.dtype(shape.dtype)), rows)


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


def forward(shape: Shape, save: bool, given: Given, stream: Stream):
  """Walks from the first chunk to the last.

  Returns:
    ((boundary or None, running, output `[B, n C, H, K]` float32), Saved or
    None). The boundary is wanted where `stream.filled` is given: the fast
    parts after that many chunks, untouched where it is none.
  """
  B, H = given.fast.shape[:2]
  out = jax.ShapeDtypeStruct(stream.query.shape, jnp.float32)
  fast = jax.ShapeDtypeStruct(given.fast.shape, jnp.float32)
  boundary = None if stream.filled is None else fast
  narrow = given._replace(maps=given.maps.astype(shape.dtype))
  saved = saved_shapes(shape, B, H) if save else None
  return call(
    _forward_kernel, shape, (B, H), (narrow, stream),
    ((boundary, fast, out), saved), 'memory_forward', WARPS, STAGES,
  )  # fmt: skip


def _forward_kernel(shape: Shape, given, stream, ends, saved):
  boundary, running, out = ends
  b, h = pl.program_id(0), pl.program_id(1)
  slow = slow_of(shape, given.maps, given.rows, given.biases, h)

  def chunk(i, fast):
    if saved is not None:
      put_saved(shape, saved, b, h, i, fast)
    if boundary is not None:

      @pl.when(i == stream.filled[b, 0])
      def _():
        put_fast(shape, boundary, b, h, fast)

    return _chunk(shape, slow, stream, out, (b, h, i), fast)

  start = fast_of(shape, given.fast, b, h)
  fast = jax.lax.fori_loop(0, shape.n, chunk, start)
  put_fast(shape, running, b, h, fast)
  if boundary is not None:

    @pl.when(stream.filled[b, 0] == shape.n)
    def _():
      put_fast(shape, boundary, b, h, fast)


def _chunk(shape: Shape, slow, stream, out, at, fast: Fast) -> Fast:
  """Reads chunk `at`; the fast parts after it."""
  cfg, dots = shape.cfg, shape.dots
  b, h, i = at
  marks = marks_of(stream.document, stream.live, b, i)
  key, value = (
    tokens_of(shape, x, b, h, i) for x in (stream.key, stream.value)
  )
  gate = gpu_tile.gates(cfg, slow, fast, key, marks)
  decay = gpu_tile.decays(gate, marks)
  vec = gpu_tile.vectors(cfg, dots, slow, fast, key, value, decay.alive)
  solve = gpu_tile.system(cfg, dots, vec, decay, gpu_tile.coupling(gate, marks))
  maps, rows = {}, {}
  last_k = solve.last_k_CxK
  for gate_name in cfg.gates:
    r = fast.rows[gate_name]
    Z = gpu_tile.writes_row(slow.rows[gate_name], r, solve)
    r = decay.kept * r
    rows[gate_name] = r + jnp.sum(Z[:, None] * last_k.astype(jnp.float32), 0)
  for box in cfg.boxes:
    D = fast.maps[box]
    Z = gpu_tile.writes(cfg, dots, box, slow.maps[box], D, solve)
    maps[box] = decay.kept * D + dots.tn(Z, last_k)
    if box == 'mem':
      query = tokens_of(shape, stream.query, b, h, i)
      q, _ = gpu_tile.unit(query.astype(jnp.float32))
      y = gpu_tile.output(
        cfg, dots, slow.maps[box], D, q, solve.k_CxK, decay,
        gpu_tile.within(gate, marks), Z,
      )  # fmt: skip
      out[b, pl.ds(i * shape.C, shape.C), h, :] = y
  return Fast(maps, rows)
