"""What the parts of the backward pass share: see `tile_backward`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import tile
from nestax.models.memory.tile_front import Front, Maps, Tokens
from nestax.models.memory.tile_gates import Sums
from nestax.models.memory.tile_ops import columns_of, nn, nt, outer, tn


class Chunk(NamedTuple):
  """What is known of a chunk, the forward pass's values again."""

  cfg: object
  dtype: object
  slow: Maps
  boundary: Maps
  running: Maps
  momentum: Maps | None
  apart: bool  # the boundary is not the running parts
  saved: tile.Saved
  tokens: Tokens
  f: Front
  mem: slice
  K: int


class Gathered:
  """Gradients that several parts add to: tokens', and values' by box."""

  def __init__(self, like):
    zero = jnp.zeros_like(like)
    self.q, self.k, self.v = zero, zero, zero
    # box -> of its columns of the slow values, the boundary, the running parts,
    # the momenta
    self.slow, self.boundary, self.running = {}, {}, {}
    self.momentum = {}
    self.sums = Sums()


def read_back(d_out, x, slow, fast, alive, dtype):
  """Of `tile_front.read`: gradients of x, of the slow and of the fast part."""
  if alive is None:
    d_maps = tn(x, d_out, dtype)
    return nt(d_out, slow + fast, dtype), d_maps, d_maps
  d_fast = alive * d_out
  d_x = nt(d_out, slow, dtype) + nt(d_fast, fast, dtype)
  return d_x, tn(x, d_out, dtype), tn(x, d_fast, dtype)


def boundary_read_back(c: Chunk, d: Gathered, d_out):
  """Of an output that is read at the boundary."""
  d_q, d.slow['mem'], d.boundary['mem'] = read_back(
    d_out, c.f.q_CxK, c.slow.maps_KxM[:, c.mem],
    c.boundary.maps_KxM[:, c.mem], c.f.alive_Cx1, c.dtype,
  )  # fmt: skip
  d.q = d.q + d_q


def written_back(c: Chunk, weight_Cx1, x_CxM, x_8xC, d_new: Maps):
  """Of steps x, written with keys times a weight: of x, and of those keys."""
  key = weight_Cx1 * c.f.k_CxK
  d_key = nt(x_CxM, d_new.maps_KxM, c.dtype)
  d_key = d_key + outer(x_8xC, d_new.gates_8xK)
  d_x = nn(key, d_new.maps_KxM, c.dtype)
  return d_x, nt(d_new.gates_8xK, key, c.dtype), d_key


def add_last(x_CxM, mem: slice, part):
  """Adds to the columns of `mem`, the last ones."""
  if not mem.start:  # Mosaic has no empty tiles
    return x_CxM + part
  return jnp.concatenate([x_CxM[:, : mem.start], x_CxM[:, mem] + part], axis=1)


def entries(a: Maps, b: Maps):
  """The sum of products of entries, `[1, 1]`."""
  total = jnp.zeros((1, 1), a.gates_8xK.dtype)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    rows = jnp.sum(x * y, axis=0, keepdims=True)
    total = total + jnp.sum(rows, axis=1, keepdims=True)
  return total


def unit_back(d_y, y, norm):
  return norm * (d_y - y * jnp.sum(d_y * y, axis=1, keepdims=True))


def place(parts, boxes, like):
  """Maps `[K, K]` of some boxes side by side, zeros for the others."""
  zero = jnp.zeros_like(like)
  return jnp.concatenate([parts.get(box, zero) for box in boxes], axis=1)


def at_gates(c: Chunk, rows_8xC):
  """`rows^T (W + D)` of the gates as they were read at the boundary."""
  slow, fast = c.slow.gates_8xK, c.boundary.gates_8xK
  if c.f.alive_Cx1 is None:
    return outer(rows_8xC, slow + fast)
  return outer(rows_8xC, slow) + c.f.alive_Cx1 * outer(rows_8xC, fast)


def alive(c: Chunk, x_CxN):
  return x_CxN if c.f.alive_Cx1 is None else x_CxN * c.f.alive_Cx1


def widen(maps: Maps | None, like):
  if maps is None:
    return None
  return maps._replace(maps_KxM=maps.maps_KxM.astype(like.dtype))


def projections_back(c: Chunk, d: Gathered):
  """From q, k, v: gradients of query, key, value but by the gates."""
  cfg, f, tokens = c.cfg, c.f, c.tokens
  of_tokens = []
  for box, d_y, y, norm, x in zip(
    ('q', 'k', 'v'), (d.q, d.k, d.v), f[:3], f.norms, tokens[:3]
  ):
    d_y = d_y if norm is None else unit_back(d_y, y, norm)
    d_x = d_y
    if box in cfg.boxes:
      at = columns_of(cfg, box, c.K)
      d_x, d.slow[box], d.boundary[box] = read_back(
        d_y, x, c.slow.maps_KxM[:, at], c.boundary.maps_KxM[:, at],
        f.alive_Cx1, c.dtype,
      )  # fmt: skip
      d_x = d_x + d_y if box in cfg.identity else d_x
    of_tokens.append(d_x)
    yield
  return of_tokens
