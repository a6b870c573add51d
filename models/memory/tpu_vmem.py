"""VMEM that the kernels want, on the smallest machine.

A v5p has 64 MiB, v5e and v6e have 128. A kernel's blocks stand there twice, the
next ones on their way, and beside them what it has no registers for.
"""

import jax
import jax.numpy as jnp

from nestax.models.memory.tile_front import Maps, State
from nestax.models.memory.tile_ops import ROWS
from nestax.models.memory.tpu_forward import saved_shapes
from nestax.models.memory.tpu_layout import Given, Shape
from nestax.models.memory.types import MemoryConfig

LANES = 128
SMALLEST = 64 * 2**20
MOST_BYTES = 32 * 2**20  # of what the chunks of a segment leave
MOST_ROWS = 512  # of tokens of all heads in a forward step
# Of what has no register, as libtpu has it.
SPILLED = 8 * 2**20


def heads_a_step(cfg: MemoryConfig, C: int, H: int, K: int, dtype) -> int:
  """Heads that one grid step takes on: what fills the lanes, two if it can.

  Two in turn hide each other's latencies, see `steps`.
  """
  if K < LANES:
    return min(H, LANES // K)
  return 1 if H % 2 or wanted(cfg, C, K, dtype, 2) > SMALLEST else 2


def heads_ahead(cfg: MemoryConfig, C: int, H: int, K: int, dtype) -> int:
  """The same of the forward kernel: twice as many where they divide the heads.

  Its gates and inverses wait for one result after the other: two heads leave
  two bundles of five empty. The step's program stays about as long as the
  backward kernel's, which two heads keep busy.
  """
  heads = heads_a_step(cfg, C, H, K, dtype)
  padded, twice = -(-H // heads) * heads, 2 * heads
  fits = wanted(cfg, C, K, dtype, twice) <= SMALLEST and twice * C <= MOST_ROWS
  return heads if padded % twice or not fits else twice


def wanted(cfg: MemoryConfig, C: int, K: int, dtype, heads: int) -> int:
  """VMEM of the backward kernel, every chunk's boundary kept."""
  state = (2 + cfg.momentum) * _maps(cfg, K)
  tokens = C * max(K, LANES // heads) * (6 * jnp.dtype(dtype).itemsize + 4)
  # the ends' and the start's gradients, initial values and theirs
  blocks = heads * (2 * state + 2 * _maps(cfg, K) + tokens)
  blocks += chunk_bytes(cfg, C, K, dtype, heads)
  return 2 * blocks + _spilled(cfg, C, K, heads)


def room(cfg: MemoryConfig, C: int, K: int, heads: int) -> int:
  """VMEM for the chunks of a segment."""
  state = (2 + cfg.momentum) * _maps(cfg, K)
  # what is kept, the ends and their gradients, initial values: each in two
  blocks = heads * (2 * (3 * state + 2 * _maps(cfg, K)) + state)
  return min(MOST_BYTES, SMALLEST - _spilled(cfg, C, K, heads) - blocks)


def _spilled(cfg: MemoryConfig, C: int, K: int, heads: int) -> int:
  """By the most that was seen of tiles `[C, K]`, `[C, F]` and `[C, C]`."""
  columns = 75 * K
  if cfg.deep:
    columns = 28 * (1 + len(cfg.deep)) * K * cfg.expansion + 13 * C
  size = heads * 4 * C * columns
  return max(SPILLED, size + cfg.momentum * size // 5)


def _width(cfg: MemoryConfig, K: int) -> int:
  """Rows of the stack of all maps."""
  return max(stop for _, stop in (cfg.rows(K)[box] for box in cfg.boxes))


def _maps(cfg: MemoryConfig, K: int) -> int:
  """Bytes of one value of a head's maps."""
  return 4 * K * (_width(cfg, K) + len(cfg.deep) * K * cfg.expansion)


def chunk_bytes(cfg: MemoryConfig, C: int, K: int, dtype, heads: int) -> int:
  """VMEM for what a chunk of some heads leaves, in whole registers."""

  def array(*shape):
    return jax.ShapeDtypeStruct((1, 1, *shape), jnp.float32)

  outer = {box: array(K * cfg.expansion, K) for box in cfg.deep}
  maps = Maps(array(K, _width(cfg, K)), None, outer or None)
  state = State(maps, maps, maps if cfg.momentum else None)
  shape = Shape(cfg, jnp.dtype(dtype).name, C, 1, heads, heads)
  saved = saved_shapes(shape, Given(None, None, state), (heads,))

  def size(x):
    rows, lanes = ROWS * 4 // x.dtype.itemsize, LANES
    return (
      (-(-x.shape[-2] // rows) * rows)
      * (-(-x.shape[-1] // lanes) * lanes)
      * x.dtype.itemsize
    )

  return heads * sum(map(size, jax.tree.leaves(saved)))
