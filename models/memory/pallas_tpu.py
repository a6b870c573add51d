"""The memory's walk over chunks as Pallas kernels for TPUs.

One grid step is one chunk of a few heads of one sequence; the chunks of a
walk follow each other, and the fast parts stay in VMEM, in the blocks that
are written back when the walk is over. The backward kernel walks the chunks
in reverse, from what the forward one saved of each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nestax.models.memory import scan, tile, tile_backward
from nestax.models.memory.tile import Maps, Saved, Tokens
from nestax.models.memory.types import GATES, MemoryConfig, Weights

LANES = 128
VMEM_BYTES = 100 * 2**20  # of 128 MiB


class DoesNotFit(ValueError):
  """The kernels do not cover this rule or shape."""


class Shape(NamedTuple):
  """What is static of a walk."""

  cfg: MemoryConfig
  dtype: str  # of the matmuls' operands
  C: int
  n: int  # chunks
  heads: int  # of one grid step


class Given(NamedTuple):
  """What a walk starts from, [H, ...] or [B, H, ...]."""

  slow: Maps
  bias: jax.Array  # [H, 8, 1]
  boundary: Maps | None
  running: Maps


class Stream(NamedTuple):
  """Inputs over the stream, [B, n C, H K]; marks by chunk."""

  query: jax.Array
  key: jax.Array
  value: jax.Array
  marks: jax.Array | None  # [B, n, 2, C], see `tile.Tokens`
  due: jax.Array | None  # [B, n, 2, C], 1 where the rest, `mem` commit


def check(cfg: MemoryConfig, C: int, K: int, dtype):
  """Raises DoesNotFit, in words, for what the kernels do not cover."""
  if cfg.deep:
    raise DoesNotFit(f'two-layer memories {cfg.deep}: only depth 1')
  if cfg.momentum:
    raise DoesNotFit('momentum=True: only without')
  if cfg.anchor != 'initial':
    raise DoesNotFit(f"anchor={cfg.anchor!r}: only 'initial'")
  if C < 8 or C > 256 or C & (C - 1):
    raise DoesNotFit(f'a chunk of {C} tokens: a power of two from 8 to 256')
  if K > 256 or K & (K - 1):
    raise DoesNotFit(f'heads of width {K}: a power of two up to 256')
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    raise DoesNotFit(f'matmuls in {jnp.dtype(dtype)}: bfloat16 or float32')


def run(cfg, initial, state, inputs, dtype, length_B=None, aligned=False):
  """`scan.run` with the kernels in place of its scan.

  Raises:
    DoesNotFit: for a rule or shape that they do not cover.
  """
  check(cfg, cfg.chunks[0], inputs.query.shape[-1], dtype)
  return scan.run(
    cfg, initial, state, inputs, dtype, length_B, aligned, walk=_walk
  )


def _walk(cfg, initial, slow, carry, xs, ends_nxB, dtype):
  """The walk that `scan._walk` describes."""
  n, B, H, C, K = xs.query_CxK.shape
  heads = min(H, max(1, LANES // K))
  padded = -(-H // heads) * heads
  shape = Shape(cfg, jnp.dtype(dtype).name, C, n, heads)
  boundary, running, _ = carry

  def by_head(x, axis):
    width = [(0, 0)] * x.ndim
    width[axis] = (0, padded - H)
    return jnp.pad(x, width) if padded > H else x

  def over_stream(x):
    x = by_head(jnp.transpose(x, (1, 0, 3, 2, 4)), 3)
    return x.reshape(B, n * C, padded * K)

  def maps(weights, axis):
    if weights is None:
      return None
    laid = _lay(cfg, weights.stack, K)
    return jax.tree.map(lambda x: by_head(x, axis), laid)

  laid = _lay(cfg, slow.stack, K)
  kernels = [initial[gate]['kernel'] for gate in GATES]
  laid = laid._replace(gates_8xK=_rows(kernels))
  bias = _rows([initial[gate]['bias'][:, None] for gate in GATES])
  given = Given(
    jax.tree.map(lambda x: by_head(x, 0), laid),
    by_head(bias, 0),
    maps(boundary, 1),
    maps(running, 1),
  )
  due = None
  if boundary is not None:
    due = jnp.stack([ends_nxB % size == 0 for size in
                     (cfg.chunk_rest, cfg.chunk_mem)], axis=-1)  # fmt: skip
    due = jnp.moveaxis(due, 0, 1)[..., None].astype(jnp.float32)
    due = jnp.broadcast_to(due, (B, n, 2, C))
  stream = Stream(*map(over_stream, xs[:3]), _marks(xs.reset_C, xs.live_C), due)
  boundary, running, out = _kernels(shape, given, stream)
  out = out.reshape(B, n, C, padded, K)[:, :, :, :H]

  def back(laid):
    if laid is None:
      return None
    return Weights(_unlay(cfg, jax.tree.map(lambda x: x[:, :H], laid)), {})

  out = jnp.transpose(out, (1, 0, 3, 2, 4))
  return (back(boundary), back(running), None), out


def _rows(rows):
  """Arrays `[..., N]` as rows `[..., 8, N]`, zeros below."""
  x = jnp.stack(rows, axis=-2)
  below = [(0, 0)] * x.ndim
  below[-2] = (0, tile.ROWS - len(rows))
  return jnp.pad(x, below)


def _lay(cfg, stack, K) -> Maps:
  """A stack `[..., R, K]` as the kernels' tiles."""
  rows = cfg.rows(K)
  gates = [
    stack[..., rows[gate][0], :]
    if gate in cfg.gates
    else jnp.zeros_like(stack[..., 0, :])
    for gate in GATES
  ]
  return Maps(stack[..., : rows['mem'][1], :].mT, _rows(gates))


def _unlay(cfg, maps: Maps):
  rows = [GATES.index(gate) for gate in cfg.gates]
  gates = [maps.gates_8xK[..., row : row + 1, :] for row in rows]
  return jnp.concatenate([maps.maps_KxM.mT, *gates], axis=-2)


def _marks(reset_nxBxC, live_nxBxC):
  if reset_nxBxC is None and live_nxBxC is None:
    return None
  if reset_nxBxC is None:
    document = jnp.zeros(live_nxBxC.shape, jnp.int32)
  else:
    document = jnp.cumsum(reset_nxBxC.astype(jnp.int32), axis=-1)
  live = jnp.ones_like(document) if live_nxBxC is None else live_nxBxC
  marks = jnp.stack([document, live.astype(jnp.int32)], axis=-2)
  return jnp.moveaxis(marks, 0, 1).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernels(shape: Shape, given: Given, stream: Stream):
  """(boundary or None, running, output [B, n C, H K]) after the walk."""
  return _either(functools.partial(_forward, shape, False), given, stream)[0]


def _kernels_fwd(shape, given, stream):
  end, saved = _either(functools.partial(_forward, shape, True), given, stream)
  return end, (given, stream, saved)


def _kernels_bwd(shape, residuals, gradients):
  given, stream, saved = residuals
  given, stream = _either(
    functools.partial(_backward, shape), given, stream, saved, gradients
  )
  return given, stream


_kernels.defvjp(_kernels_fwd, _kernels_bwd)


def _either(function, *args):
  """Compiled for a TPU, interpreted anywhere else."""
  return jax.lax.platform_dependent(
    *args,
    tpu=functools.partial(function, False),
    default=functools.partial(function, True),
  )


class _Specs:
  """Block specs of a grid of (sequences, groups of heads, chunks)."""

  def __init__(self, shape: Shape, K: int, reverse: bool):
    self.heads, self.C, self.K, n = shape.heads, shape.C, K, shape.n
    self.chunk = (lambda i: n - 1 - i) if reverse else (lambda i: i)

  def slow(self, x):
    """`[H, ...]`: the same for every sequence and chunk."""
    block = (self.heads, *x.shape[1:])
    return pl.BlockSpec(block, lambda b, h, i: (h, 0, 0))

  def state(self, x):
    """`[B, H, ...]`: stays in VMEM for a whole walk."""
    block = (1, self.heads, *x.shape[2:])
    return pl.BlockSpec(block, lambda b, h, i: (b, h, 0, 0))

  def saved(self, x):
    """`[B, H, n, ...]`."""
    block = (1, self.heads, 1, *x.shape[3:])
    return pl.BlockSpec(block, lambda b, h, i: (b, h, self.chunk(i), 0, 0))

  def tokens(self, x):
    """`[B, n C, H K]`."""
    del x
    block = (1, self.C, self.heads * self.K)
    return pl.BlockSpec(block, lambda b, h, i: (b, self.chunk(i), h))

  def chunks(self, x):
    """`[B, n, 2, C]`: the same for every head."""
    block = (1, 1, *x.shape[2:])
    return pl.BlockSpec(block, lambda b, h, i: (b, self.chunk(i), 0, 0))

  def given(self, given: Given):
    return Given(
      jax.tree.map(self.slow, given.slow),
      self.slow(given.bias),
      jax.tree.map(self.state, given.boundary),
      jax.tree.map(self.state, given.running),
    )

  def stream(self, stream: Stream):
    marks = jax.tree.map(self.chunks, (stream.marks, stream.due))
    return Stream(*map(self.tokens, stream[:3]), *marks)


def _like(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _call(kernel, shape, given, interpret, args, in_specs, outs, out_specs):
  B, groups = given.running.maps_KxM.shape[:2]
  return pl.pallas_call(
    kernel,
    grid=(B, groups // shape.heads, shape.n),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=outs,
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    name=kernel.func.__name__.strip('_'),
  )(*args)


def _saved_shapes(shape: Shape, given: Given):
  """What the forward kernel keeps for the backward one, `[B, H, n, ...]`."""
  B, H, K, M = given.running.maps_KxM.shape
  lead, dtype = (B, H, shape.n), jnp.dtype(shape.dtype)

  def array(rows, columns, dtype):
    return jax.ShapeDtypeStruct((*lead, rows, columns), dtype)

  def fast():
    return Maps(array(K, M, dtype), array(tile.ROWS, K, jnp.float32))

  return Saved(
    fast(),
    None if given.boundary is None else fast(),
    array(shape.C, shape.C, dtype),
    array(shape.C, M, dtype),
    array(tile.ROWS, shape.C, jnp.float32),
  )


def _forward(shape: Shape, save: bool, interpret: bool, given, stream):
  """((boundary or None, running, output), Saved or None)."""
  specs = _Specs(shape, given.running.maps_KxM.shape[2], reverse=False)
  out = jax.ShapeDtypeStruct(stream.query.shape, jnp.float32)
  end = (given.boundary, given.running)
  saved = _saved_shapes(shape, given) if save else None
  return _call(
    functools.partial(_forward_kernel, shape),
    shape,
    given,
    interpret,
    (given, stream),
    (specs.given(given), specs.stream(stream)),
    ((*_like(end), out), saved),
    (
      (*jax.tree.map(specs.state, end), specs.tokens(out)),
      jax.tree.map(specs.saved, saved),
    ),
  )


def _head(shape: Shape, given: Given, stream: Stream, p: int):
  """(slow, bias, tokens) of one head of a block."""
  K = stream.query.shape[2] // shape.heads
  lanes = slice(p * K, (p + 1) * K)
  slow = jax.tree.map(lambda ref: ref[p], given.slow)
  marks = None if stream.marks is None else stream.marks[0, 0]
  tokens = Tokens(*(ref[0, :, lanes] for ref in stream[:3]), marks)
  return slow, given.bias[p], tokens, lanes


def _put(refs, p: int, values):
  """Writes one head's part of blocks `[1, P, ...]` or `[1, P, 1, ...]`."""

  def put(ref, value):
    at = (0, p, 0) if ref.ndim == 5 else (0, p)
    ref[at] = value.astype(ref.dtype)

  jax.tree.map(put, refs, values)


def _due(cfg, due_ref, M: int, K: int):
  """1 where columns of the maps commit, `[1, M]`, and the gates, `[1, 1]`."""
  due = due_ref[0, 0][:, 0:1]
  is_mem = jax.lax.broadcasted_iota(jnp.int32, (1, M), 1) >= M - K
  maps = jnp.where(is_mem, due[1:2], due[0:1])
  return Maps(maps, due[0:1])


def _forward_kernel(shape: Shape, given, stream, ends, saved):
  boundary, running, out = ends
  cfg, dtype = shape.cfg, jnp.dtype(shape.dtype)

  @pl.when(pl.program_id(2) == 0)
  def _():
    starts = (given.boundary, given.running)
    jax.tree.map(lambda to, at: to.__setitem__(..., at[...]), ends[:2], starts)

  for p in range(shape.heads):
    slow, bias, tokens, lanes = _head(shape, given, stream, p)
    fast, at_boundary = jax.tree.map(lambda ref: ref[0, p], (running, boundary))  # noqa: B023
    at_boundary, new, y, kept = tile.forward(
      cfg, slow, bias, at_boundary, fast, tokens, dtype
    )
    if boundary is not None:
      M, K = new.maps_KxM.shape[1], y.shape[1]
      due = _due(cfg, stream.due, M, K)
      at_boundary = jax.tree.map(
        lambda d, r, b: jnp.where(d != 0, r, b), due, new, at_boundary
      )
      _put(boundary, p, at_boundary)
    _put(running, p, new)
    out[0, :, lanes] = y
    if saved is not None:
      _put(saved, p, kept)


def _backward(shape: Shape, interpret: bool, given, stream, saved, gradients):
  """Gradients of `given` and `stream`."""
  specs = _Specs(shape, given.running.maps_KxM.shape[2], reverse=True)
  d_boundary, d_running, d_out = gradients
  B, H = given.running.maps_KxM.shape[:2]
  ends = (d_boundary, d_running)
  logit = jax.ShapeDtypeStruct((B, H, tile.ROWS, shape.C), jnp.float32)
  d_slow = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((B, *x.shape), jnp.float32), given.slow
  )
  d_tokens = _like(tuple(stream[:3]))
  totals, tokens = _call(
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
    ((_like(ends), d_slow, logit), d_tokens),
    (
      jax.tree.map(specs.state, (ends, d_slow, logit)),
      jax.tree.map(specs.tokens, d_tokens),
    ),
  )
  (d_boundary, d_running), d_slow, d_logit = totals
  d_slow = jax.tree.map(lambda x: jnp.sum(x, axis=0), d_slow)
  d_bias = jnp.sum(d_logit, axis=(0, 3))[..., None]
  return (
    Given(d_slow, d_bias, d_boundary, d_running),
    Stream(*tokens, None, None),
  )


def _backward_kernel(shape, given, stream, saved, starts, d_out, totals, outs):
  (d_boundary, d_running), d_slow, d_logit = totals
  cfg, dtype = shape.cfg, jnp.dtype(shape.dtype)
  given = Given(*given, None, None)

  @pl.when(pl.program_id(2) == 0)
  def _():
    ends = (d_boundary, d_running)
    jax.tree.map(lambda to, at: to.__setitem__(..., at[...]), ends, starts)
    for ref in jax.tree.leaves((d_slow, d_logit)):
      ref[...] = jnp.zeros_like(ref)

  for p in range(shape.heads):
    slow, bias, tokens, lanes = _head(shape, given, stream, p)
    kept = jax.tree.map(lambda ref: ref[0, p, 0], saved)  # noqa: B023
    of_boundary, of_new = jax.tree.map(
      lambda ref: ref[0, p],  # noqa: B023
      (d_boundary, d_running),
    )
    if d_boundary is not None:
      M, K = of_new.maps_KxM.shape[1], lanes.stop - lanes.start
      due = _due(cfg, stream.due, M, K)
      of_new = jax.tree.map(lambda d, r, b: r + d * b, due, of_new, of_boundary)
      of_boundary = jax.tree.map(lambda d, b: (1 - d) * b, due, of_boundary)
    of_boundary, of_running, of_slow, of_logit, of_tokens = (
      tile_backward.backward(
        cfg, slow, bias, kept, tokens, of_boundary, of_new,
        d_out[0, :, lanes], dtype,
      )
    )  # fmt: skip
    _put(d_running, p, of_running)
    if d_boundary is not None:
      _put(d_boundary, p, of_boundary)
    total = jax.tree.map(
      lambda ref, x: ref[0, p] + x,  # noqa: B023
      (d_slow, d_logit),
      (of_slow, of_logit),
    )
    _put((d_slow, d_logit), p, total)
    for ref, value in zip(outs, of_tokens):
      ref[0, :, lanes] = value.astype(ref.dtype)
