"""How the walk's arrays lie in a GPU's memory, and how kernels are called."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory.gpu_gates import Gates, Marks
from nestax.models.memory.gpu_tile import COLUMNS, Dots, unit
from nestax.models.memory.gpu_triton import triton
from nestax.models.memory.types import GATES, MemoryConfig

SCALARS = (*Gates._fields, 'k_norm', 'v_norm')
NARROW = 64  # heads up to which there is room for more at once
GROUP = 8  # chunks that one program reads where they can be read in any order


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
  def carried(self) -> tuple[str, ...]:
    """The maps that keys and values are read from."""
    return tuple(box for box in self.cfg.boxes if box != 'mem')

  @property
  def own_gates(self) -> tuple[str, ...]:
    """The gates that are read from keys, not handed in."""
    cfg = self.cfg
    read = {*cfg.gates, 'eta', *(['alpha'] if cfg.retention else [])}
    return tuple(g for g in GATES if g in read and g not in cfg.given)

  @property
  def free(self) -> bool:
    """No chunk's keys, values or gates depend on the chunk before."""
    return not self.carried and not self.cfg.gates


class Given(NamedTuple):
  """What a walk starts from."""

  stack: jax.Array  # slow values, [H, R, K]; Weights where `mem` is deep
  # both gates' as their logits read them, [H, 2, K]; None: neither is read
  rows: jax.Array | None
  biases: jax.Array | None  # [H, 2]
  fast: jax.Array  # the same of fast parts, [B, H, R, K]
  momentum: jax.Array | None = None  # the same of momenta


class Stream(NamedTuple):
  """Inputs over the stream."""

  query: jax.Array  # [B, n C, H, K]
  key: jax.Array
  value: jax.Array
  document: jax.Array | None  # [B, n, C], see `gpu_gates.Marks`
  live: jax.Array | None
  filled: jax.Array | None  # [B, 1], chunks that the tokens fill
  # of the momentum's gate, the log of its product from each chunk's start
  total_b: jax.Array | None = None  # [B, H, n, C]
  # gates that are handed in, float32
  log_eta: jax.Array | None = None  # [B, H, n, C]
  log_alpha: jax.Array | None = None


class Fast(NamedTuple):
  """One value of all memories, each by itself, `[..., K, K]` but the gates."""

  maps: dict[str, jax.Array]  # those that keys and values are read from
  gates: jax.Array | None  # [..., K, COLUMNS], a gate a column; None: none
  mem: jax.Array


class Slow(NamedTuple):
  """Slow values as the kernels take them, maps in the matmuls' dtype."""

  maps: dict[str, jax.Array]  # [H, K, K]
  gates: jax.Array | None  # of gates that are memories, [H, K, COLUMNS]
  rows: jax.Array | None  # both gates', [H, K, COLUMNS] float32
  biases: jax.Array | None  # [H, 2]


def apart(shape: Shape, stack) -> Fast:
  """The memories of a stack `[..., R, K]`."""
  cfg, rows = shape.cfg, shape.cfg.rows(shape.K)
  maps = {box: stack[..., slice(*rows[box]), :] for box in cfg.boxes}
  gates = None
  if cfg.gates:
    empty = jnp.zeros_like(stack[..., 0, :])
    columns = [
      stack[..., rows[gate][0], :] if gate in cfg.gates else empty
      for gate in GATES
    ]
    gates = _columns(columns)
  return Fast(maps, gates, maps.pop('mem'))


def together(shape: Shape, fast: Fast):
  """The stack `[..., R, K]` of memories."""
  maps = fast.maps | {'mem': fast.mem}
  parts = [maps[box] for box in shape.cfg.boxes]
  for gate in shape.cfg.gates:
    parts.append(fast.gates[..., GATES.index(gate)][..., None, :])
  return jnp.concatenate(parts, axis=-2)


def _columns(rows):
  """`[..., K, COLUMNS]` of rows `[..., K]`."""
  width = [(0, 0)] * rows[0].ndim + [(0, COLUMNS - len(rows))]
  return jnp.pad(jnp.stack(rows, axis=-1), width)


def lay(shape: Shape, given: Given) -> Slow:
  slow = apart(shape, given.stack)
  # without their identity: ones on the diagonal would round what is beside them
  maps, gates = jax.tree.map(
    lambda w: w.astype(shape.dtype),
    (slow.maps | {'mem': slow.mem}, slow.gates),
  )
  rows = given.rows
  if rows is not None:
    rows = _columns([rows[:, j] for j in range(len(GATES))])
  return Slow(maps, gates, rows, given.biases)


def array(shape: Shape, B: int, H: int):
  """Makes shapes of arrays by chunks, `[B, H, n, ...]`."""

  def make(*tail, dtype=shape.dtype):
    return jax.ShapeDtypeStruct((B, H, shape.n, *tail), jnp.dtype(dtype))

  return make


def anchors(shape: Shape):
  """Zeros for `anchored`."""
  return jnp.zeros((shape.n,), jnp.int32)


def anchored(zeros, b, h, i):
  """A chunk's indices, with a zero that is not known before.

  Addresses and masks that every pass has in common the compiler would keep in
  registers, of which there are too few; what depends on a number that was just
  read is computed when it is needed.
  """
  zero = zeros[i]
  return b + zero, h + zero, i + zero


def tokens_of(shape: Shape, x, at):
  b, h, i = at
  return x[b, pl.ds(i * shape.C, shape.C), h, :]


def query_of(shape: Shape, stream, at):
  """(Query `[C, K]` float32, its reciprocal norm or None), as it reads."""
  query = tokens_of(shape, stream.query, at).astype(jnp.float32)
  return unit(query) if shape.cfg.key_norm else (query, None)


def put_tokens(shape: Shape, ref, at, x) -> None:
  b, h, i = at
  ref[b, pl.ds(i * shape.C, shape.C), h, :] = x.astype(ref.dtype)


def marks_of(stream, at) -> Marks:
  b, _, i = at
  document, live = stream.document, stream.live
  return Marks(
    None if document is None else document[b, i, :],
    None if live is None else live[b, i, :],
  )


def scalars_of(shape: Shape, scalars, at):
  """(Gates, reciprocal norms of k and v, None where not taken)."""
  b, h, i = at
  rows = [scalars[b, h, i, j, :] for j in range(len(SCALARS))]
  *gate, k_norm, v_norm = rows
  k_norm = k_norm if shape.cfg.key_norm else None
  return Gates(*gate), k_norm, v_norm if shape.cfg.value_norm else None


def end_of(shape: Shape, scalars, at, name: str):
  """A row's last entry, read alone: to find it among others takes longer."""
  b, h, i = at
  return scalars[b, h, i, SCALARS.index(name), shape.C - 1]


def put(ref, at, x) -> None:
  b, h, i = at
  ref[b, h, i, :, :] = x.astype(ref.dtype)


def put_rows(ref, at, rows) -> None:
  b, h, i = at
  for j, row in enumerate(rows):
    ref[b, h, i, j, :] = row


def groups(shape: Shape) -> int:
  return -(-shape.n // GROUP)


def over_group(shape: Shape, chunk, start=None):
  """Runs `x = chunk((b, h, i), x)` over the chunks of this program's group.

  The grid is of groups, heads and sequences. What a chunk reads is fetched
  while the one before is computed.
  """
  group, h, b = (pl.program_id(axis) for axis in range(3))
  first = group * GROUP
  last = jnp.minimum(first + GROUP, shape.n)
  return jax.lax.fori_loop(first, last, lambda i, x: chunk((b, h, i), x), start)


def call(kernel, shape: Shape, grid, args, outs, name, warps, stages):
  """A Triton kernel over whole arrays, which it indexes itself."""
  everywhere = pl.BlockSpec(memory_space=pl.ANY)
  if shape.dtype == 'float32' or shape.K > NARROW:
    stages = 1  # more sets of tiles twice as wide do not fit
  if shape.K > NARROW:
    warps = 8  # which share the registers that such tiles take
  return pl.pallas_call(
    functools.partial(kernel, shape),
    grid=grid,
    in_specs=jax.tree.map(lambda _: everywhere, args),
    out_specs=jax.tree.map(lambda _: everywhere, outs),
    out_shape=outs,
    interpret=shape.interpret,
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    name=name,
  )(*args)
