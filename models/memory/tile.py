"""A chunk of matrix memories on two-dimensional tiles, forward.

For the layout see `tile_front`. The backward pass, `tile_backward`, takes what
only the forward pass can know cheaply: the inverse T of the triangular system
and its solution Z. No momentum here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.inverse import dense_inverse
from nestax.models.memory.tile_front import Maps, front, read
from nestax.models.memory.tile_ops import columns_of, iota, nn, nt, tn


class Saved(NamedTuple):
  """What the backward pass takes from the forward pass."""

  running: Maps  # at the chunk's start; maps in the matmuls' dtype
  boundary: Maps | None  # None: the running ones
  T_CxC: jax.Array
  Z_CxM: jax.Array
  Zg_8xC: jax.Array


def adaptive(cfg, tile):
  """The tile with the rows of gates that are no memories set to zero."""
  if len(cfg.gates) == 2:
    return jnp.where(iota(tile.shape, 0) < 2, tile, 0.0)
  if not cfg.gates:
    return jnp.zeros_like(tile)
  row = 0 if cfg.gates[0] == 'eta' else 1
  return jnp.where(iota(tile.shape, 0) == row, tile, 0.0)


def inner_point(cfg, k, v):
  """Where the stack is read for the inner gradients: the reads are linear."""
  point = k if cfg.objective == 'l2' else jnp.zeros_like(k)
  return point - v if cfg.generated else point


def targets(cfg, k, v):
  """What each map's error has beside its read, `[C, M]`."""
  l2 = cfg.objective == 'l2'
  parts = [k - v if l2 and box in cfg.identity else -v for box in cfg.boxes]
  return jnp.concatenate(parts, axis=1)


def _gate_errors(cfg, slow, boundary, point, rows, dtype):
  """Inner gradients of the gates' memories, `[8, C]`."""
  if 'alive' in rows:
    e = nt(slow.gates_8xK, point, dtype)
    e = e + rows['alive'] * nt(boundary.gates_8xK, point, dtype)
  else:
    e = nt(slow.gates_8xK + boundary.gates_8xK, point, dtype)
  return adaptive(cfg, e)


def gate_terms(cfg, slow, boundary, running, point, k, rows, dtype):
  """Both terms of the gates' right-hand side, `[8, C]`."""
  e = -rows['eta'] * _gate_errors(cfg, slow, boundary, point, rows, dtype)
  if not cfg.delta:
    return e, jnp.zeros_like(e)
  kept = adaptive(cfg, nt(running.gates_8xK, k, dtype))
  return e, -rows['eta_g'] * kept


def forward(cfg, slow: Maps, bias_8x1, boundary, running: Maps, tokens, dtype):
  """Advances one head by a chunk.

  Args:
    cfg: the rule: matrix memories, no momentum, anchored at initial values.
    slow: initial values; slow gates too.
    bias_8x1: of the gates, rows as in `Maps`.
    boundary: fast parts at the boundary; None: the running ones.
    running: fast parts at the chunk's start.
    tokens: inputs.
    dtype: of the matmuls' operands.

  Returns:
    (boundary or None, running, output `[C, K]` float32, Saved).
  """
  K = tokens.key_CxK.shape[1]
  at_boundary = running if boundary is None else boundary
  f = front(cfg, slow, bias_8x1, at_boundary, tokens, dtype)
  columns, rows = f.columns, f.rows
  k = f.k_CxK.astype(dtype)
  point = inner_point(cfg, f.k_CxK, f.v_CxK).astype(dtype)
  mem = columns_of(cfg, 'mem', K)

  rhs = targets(cfg, f.k_CxK, f.v_CxK)
  rhs = rhs + read(
    point, slow.maps_KxM, at_boundary.maps_KxM, f.alive_Cx1, dtype
  )
  rhs = -columns['eta'] * rhs
  first, second = gate_terms(
    cfg, slow, at_boundary, running, point, k, rows, dtype
  )
  if cfg.delta:
    rhs = rhs - columns['eta_g'] * nn(k, running.maps_KxM, dtype)
    T = dense_inverse(f.E_CxC * nt(k, k, dtype), dtype).astype(dtype)
    Z = nn(T, rhs, dtype).astype(dtype)
    Zg = nt(first + second, T, dtype)
  else:
    T, Z, Zg = jnp.zeros_like(f.E_CxC, dtype), rhs.astype(dtype), first

  if cfg.read == 'token':
    q = f.q_CxK
    out = nn(q, slow.maps_KxM[:, mem], dtype)
    out = out + columns['g'] * nn(q, running.maps_KxM[:, mem], dtype)
    out = out + nn(f.G_CxC * nt(q, k, dtype), Z[:, mem], dtype)
  else:
    out = read(
      f.q_CxK,
      slow.maps_KxM[:, mem],
      at_boundary.maps_KxM[:, mem],
      f.alive_Cx1,
      dtype,
    )
  if 'mem' in cfg.identity:
    out = out + f.q_CxK

  C = rows['g'].shape[1]
  kept = rows['g'][:, C - 1 :]
  new = Maps(
    kept * running.maps_KxM + tn(columns['last'] * f.k_CxK, Z, dtype),
    kept * running.gates_8xK + nn(rows['last'] * Zg, k, dtype),
  )
  saved = Saved(_narrow(running, dtype), None, T, Z, Zg)
  if boundary is not None:
    saved = saved._replace(boundary=_narrow(boundary, dtype))
    if 'alive' in rows:
      boundary = jax.tree.map(lambda x: rows['alive'][:, C - 1 :] * x, boundary)
  return boundary, new, out, saved


def _narrow(maps: Maps, dtype):
  return maps._replace(maps_KxM=maps.maps_KxM.astype(dtype))
