"""What the TPU kernels are given, laid out as they take it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.tile_front import Maps, State
from nestax.models.memory.tile_ops import ROWS
from nestax.models.memory.types import GATES, MemoryConfig


class Shape(NamedTuple):
  """What is static of a walk."""

  cfg: MemoryConfig
  dtype: str  # of the matmuls' operands
  C: int
  n: int  # chunks
  heads: int  # of one grid step
  ahead: int  # of one of the forward kernel

  @property
  def stride(self) -> int:
    """Chunks of a segment, from one saved boundary to the next."""
    return min(self.cfg.stride, self.n)

  @property
  def segments(self) -> int:
    return -(-self.n // self.stride)


class Given(NamedTuple):
  """What a walk starts from, [H, ...] or [B, H, ...]."""

  slow: Maps
  bias: jax.Array  # [H, 8, 1]
  state: State


class Stream(NamedTuple):
  """Inputs over the stream, [B, n C, H K]; marks by chunk."""

  query: jax.Array
  key: jax.Array
  value: jax.Array
  marks: jax.Array | None  # [B, n, 2, C], see `tile.Tokens`
  due: jax.Array | None  # [B, n, 2, C], 1 where the rest, `mem` commit
  handed: jax.Array | None  # [B, H, n, R, C], see `tile_front.handed`


def as_rows(rows):
  """Arrays `[..., N]` as rows `[..., 8, N]`, zeros below."""
  x = jnp.stack(rows, axis=-2)
  below = [(0, 0)] * x.ndim
  below[-2] = (0, ROWS - len(rows))
  return jnp.pad(x, below)


def lay(cfg, stack, K, outer=None) -> Maps:
  """A stack `[..., R, K]`, and second layers, as the kernels' tiles."""
  rows = cfg.rows(K)
  gates = [
    stack[..., rows[gate][0], :]
    if gate in cfg.gates
    else jnp.zeros_like(stack[..., 0, :])
    for gate in GATES
  ]
  outer = {box: outer[box].mT for box in cfg.deep} if cfg.deep else None
  return Maps(stack[..., : rows['mem'][1], :].mT, as_rows(gates), outer)


def unlay(cfg, maps: Maps):
  """The stack again."""
  rows = [GATES.index(gate) for gate in cfg.gates]
  gates = [maps.gates_8xK[..., row : row + 1, :] for row in rows]
  return jnp.concatenate([maps.maps_KxM.mT, *gates], axis=-2)


def marks(reset_nxBxC, live_nxBxC):
  if reset_nxBxC is None and live_nxBxC is None:
    return None
  if reset_nxBxC is None:
    document = jnp.zeros(live_nxBxC.shape, jnp.int32)
  else:
    document = jnp.cumsum(reset_nxBxC.astype(jnp.int32), axis=-1)
  live = jnp.ones_like(document) if live_nxBxC is None else live_nxBxC
  both = jnp.stack([document, live.astype(jnp.int32)], axis=-2)
  return jnp.moveaxis(both, 0, 1).astype(jnp.float32)
