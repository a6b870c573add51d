"""Grid, blocks and heads of the TPU kernels, forward and backward alike."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nestax.models.memory import cost
from nestax.models.memory.tile_front import Maps, Tokens
from nestax.models.memory.tile_ops import columns_of
from nestax.models.memory.tpu_layout import Given, Shape, Stream

VMEM_BYTES = 100 * 2**20  # of 128 MiB; a v5p has 64


class Specs:
  """Block specs of a grid of (sequences, groups of heads, *steps).

  Args:
    shape: of the walk.
    K: width of a head.
    chunk: the chunk that a step reads or writes, of its place in the grid.
    segment: the same of what is kept; None: it is kept of every chunk.
  """

  def __init__(self, shape: Shape, K: int, chunk, segment=None):
    self.heads, self.C, self.K = shape.heads, shape.C, K
    self.chunk, self.segment = chunk, segment or chunk

  def slow(self, x):
    """`[H, ...]`: the same for every sequence and chunk."""
    block = (self.heads, *x.shape[1:])
    return pl.BlockSpec(block, lambda b, h, *i: (h, 0, 0))

  def state(self, x):
    """`[B, H, ...]`: stays in VMEM for a whole walk."""
    block = (1, self.heads, *x.shape[2:])
    return pl.BlockSpec(block, lambda b, h, *i: (b, h, 0, 0))

  def kept(self, x):
    """`[B, H, n, ...]`, or of segments."""
    block = (1, self.heads, None, *x.shape[3:])
    return pl.BlockSpec(block, lambda b, h, *i: (b, h, self.segment(*i), 0, 0))

  def tokens(self, x):
    """`[B, n C, H K]`."""
    del x
    block = (1, self.C, self.heads * self.K)
    return pl.BlockSpec(block, lambda b, h, *i: (b, self.chunk(*i), h))

  def chunks(self, x):
    """`[B, n, 2, C]`: the same for every head."""
    block = (1, 1, *x.shape[2:])
    return pl.BlockSpec(block, lambda b, h, *i: (b, self.chunk(*i), 0, 0))

  def gates(self, x):
    """`[B, H, n, R, C]`: rows of a chunk."""
    block = (1, self.heads, None, *x.shape[3:])
    return pl.BlockSpec(block, lambda b, h, *i: (b, h, self.chunk(*i), 0, 0))

  def given(self, given: Given):
    return Given(
      jax.tree.map(self.slow, given.slow),
      self.slow(given.bias),
      jax.tree.map(self.state, given.state),
    )

  def stream(self, stream: Stream):
    marks = jax.tree.map(self.chunks, (stream.marks, stream.due))
    handed = jax.tree.map(self.gates, stream.handed)
    return Stream(*map(self.tokens, stream[:3]), *marks, handed)


def like(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def call(
  name, kernel, shape, given, interpret, args, in_specs, outs, out_specs,
  steps=None, scratch=(),
):  # fmt: skip
  """A kernel on a grid of (sequences, groups of heads, *steps or chunks)."""
  B, groups, K = given.state.running.maps_KxM.shape[:3]
  steps = steps or (shape.n,)
  return pl.pallas_call(
    kernel,
    grid=(B, groups // shape.heads, *steps),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=outs,
    scratch_shapes=scratch,
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * 2 + ('arbitrary',) * len(steps),
      vmem_limit_bytes=VMEM_BYTES,
    ),
    cost_estimate=_cost(name, shape, B * groups, K, (args, outs)),
    name=name,
  )(*args)


def _cost(name, shape: Shape, walks: int, K: int, moved) -> pl.CostEstimate:
  """What the compiler, and who reads its programs, may count for a kernel."""
  tokens = walks * shape.n * shape.C
  forward = cost.flops_per_token(shape.cfg, K) * tokens
  passes = 1
  if name == 'memory_backward':
    # the forward pass again between boundaries, and to be differentiated
    passes = 2 + (shape.stride > 1) + bool(shape.cfg.deep)
  return pl.CostEstimate(
    flops=int(forward * passes),
    transcendentals=0,
    bytes_accessed=sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(moved)
    ),
  )


def lanes_of(shape: Shape, x, p: int) -> slice:
  """Where head p stands in a block `[1, C, P K]`."""
  K = x.shape[2] // shape.heads
  return slice(p * K, (p + 1) * K)


def head_of(shape: Shape, given: Given, stream: Stream, p: int):
  """(slow, bias, tokens) of one head of a block."""
  lanes = lanes_of(shape, stream.query, p)
  slow = jax.tree.map(lambda ref: ref[p], given.slow)
  marks = None if stream.marks is None else stream.marks[0, 0]
  handed = None if stream.handed is None else stream.handed[0, p]
  tokens = Tokens(*(ref[0, :, lanes] for ref in stream[:3]), marks, handed)
  return slow, given.bias[p], tokens


def copy(to, at):
  """Copies blocks `[1, P, N, ...]` by a loop: once a walk, and few words."""
  N = to.shape[2]
  step = math.gcd(N, 64)

  @pl.loop(0, N // step)
  def _(i):
    rows = pl.ds(i * step, step)
    to[:, :, rows] = at[:, :, rows]


def put(refs, p: int, values, i=0):
  """Writes one head's part of blocks `[1, P, ...]`, or of the i-th of some."""

  def one(ref, value):
    ref[i, p] = value.astype(ref.dtype)

  jax.tree.map(one, refs, values)


def due_of(cfg, due_ref, M: int, K: int):
  """1 where columns of the maps commit, `[1, M]`; the others, `[1, 1]`."""
  due = due_ref[0, 0][:, 0:1]
  start = columns_of(cfg, 'mem', K).start
  is_mem = jax.lax.broadcasted_iota(jnp.int32, (1, M), 1) >= start
  maps = jnp.where(is_mem, due[1:2], due[0:1])
  outer = {box: due[1:2] if box == 'mem' else due[0:1] for box in cfg.deep}
  return Maps(maps, due[0:1], outer or None)
