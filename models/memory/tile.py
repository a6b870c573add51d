"""A chunk of matrix memories on two-dimensional tiles, forward.

For the layout see `tile_front`. The backward pass, `tile_backward`, takes what
only the forward pass can know cheaply: the inverse T of the triangular system
and its solution Z. Momentum is in `tile_momentum`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import tile_anchor
from nestax.models.memory.inverse import inverse_steps
from nestax.models.memory.steps import beside
from nestax.models.memory.tile_front import (
  Maps,
  State,
  front_steps,
  reach,
  read,
)
from nestax.models.memory.tile_ops import adaptive, columns_of, nn, nt, tn


class Saved(NamedTuple):
  """What the backward pass takes from the forward pass."""

  state: State  # at the chunk's start; maps in the matmuls' dtype
  T_CxC: jax.Array | None
  Z_CxM: jax.Array | None
  Zg_8xC: jax.Array | None
  # with momentum, Z and the steps U apart, and no T and Z without `delta`
  U_CxM: jax.Array | None = None
  Ug_8xC: jax.Array | None = None


def inner_point(cfg, k, v):
  """Where the stack is read for the inner gradients: the reads are linear."""
  point = k if cfg.objective == 'l2' else jnp.zeros_like(k)
  return point - v if cfg.generated else point


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


def errors(cfg, f, slow, at_boundary, point, dtype):
  """Inner gradients at the boundary, by box `[C, K]`."""
  toward = -f.v_CxK
  apart = f.k_CxK - f.v_CxK if cfg.objective == 'l2' else toward
  for box in cfg.boxes:
    at = columns_of(cfg, box, point.shape[1])
    e = apart if box in cfg.identity else toward
    yield e + read(
      point, slow.maps_KxM[:, at], at_boundary.maps_KxM[:, at], f.alive_Cx1,
      dtype,
    )  # fmt: skip


def _right_sides(cfg, f, slow, at_boundary, running, point, k, dtype):
  """Of the system, divided by -eta, a list by box of `[C, K]`.

  A generator of steps.
  """
  columns, K = f.columns, k.shape[1]
  sides = []
  of_boxes = errors(cfg, f, slow, at_boundary, point, dtype)
  for box, e in zip(cfg.boxes, of_boxes):
    at = columns_of(cfg, box, K)
    if cfg.delta:
      e = e + columns['g_p'] * nn(k, running.maps_KxM[:, at], dtype)
      e = tile_anchor.add_side(cfg, f, e, slow.maps_KxM[:, at], k, dtype)
    sides.append(e.astype(dtype))
    yield
  return sides


def read_before(cfg, f, slow, at_boundary, running, k, dtype):
  """(output but for what the chunk writes, q k^T or None where it reads none).

  A generator of steps.
  """
  mem = columns_of(cfg, 'mem', k.shape[1])
  q = f.q_CxK.astype(dtype)
  qk = None
  if cfg.read == 'token':
    out = tile_anchor.read(cfg, f, slow.maps_KxM[:, mem], q, dtype)
    yield
    out = out + f.columns['g'] * nn(q, running.maps_KxM[:, mem], dtype)
    yield
    qk = nt(q, k, dtype)
  else:
    out = read(
      q, slow.maps_KxM[:, mem], at_boundary.maps_KxM[:, mem], f.alive_Cx1, dtype
    )
  yield
  if 'mem' in cfg.identity:
    out = out + f.q_CxK
  return out, qk


def inverse(cfg, f, k, dtype):
  """Of the system, None where there is none; a generator of steps."""
  if not cfg.delta:
    return None
  L = f.E_CxC * nt(k, k, dtype)
  yield
  return (yield from inverse_steps(L, dtype))


def forward_steps(cfg, slow: Maps, bias_8x1, state: State, tokens, dtype):
  """Advances one head by a chunk: a generator, see `steps`.

  Args:
    cfg: the rule: matrix memories, no momentum.
    slow: initial values; slow gates too.
    bias_8x1: of the gates, rows as in `Maps`.
    state: fast parts at the chunk's start.
    tokens: inputs.
    dtype: of the matmuls' operands.

  Returns:
    (State after it, output `[C, K]` float32, Saved).
  """
  K = tokens.key_CxK.shape[1]
  boundary, running, _ = state
  at_boundary = running if boundary is None else boundary
  f = yield from front_steps(
    cfg, slow, bias_8x1, at_boundary, tokens, dtype, ahead=True
  )
  yield
  rows, k = f.rows, f.k_CxK.astype(dtype)
  point = inner_point(cfg, f.k_CxK, f.v_CxK).astype(dtype)

  def reads():
    G = reach(rows, f.columns)
    yield
    out, qk = yield from read_before(
      cfg, f, slow, at_boundary, running, k, dtype
    )
    within = None if qk is None else (G * qk).astype(dtype)
    sides = yield from _right_sides(
      cfg, f, slow, at_boundary, running, point, k, dtype
    )
    of_gates = gate_terms(
      cfg, slow, at_boundary, running, point, k, rows, dtype
    )
    return out, within, sides, of_gates

  # the inverse waits for one product after the other
  (out, within, sides, (first, second)), T = yield from beside(
    reads(), inverse(cfg, f, k, dtype)
  )
  if cfg.delta:
    # a row times T, where a column times each side would be moved over lanes
    solve, T = (-rows['eta'] * T).astype(dtype), T.astype(dtype)
    yield
    Z = []
    for side in sides:
      Z.append(nn(solve, side, dtype).astype(dtype))
      yield
    second = tile_anchor.add_gate_side(cfg, f, second, slow, k, dtype)
    Zg = nt(first + second, T, dtype)
  else:
    T, Zg = jnp.zeros_like(f.E_CxC, dtype), first
    Z = [(-f.columns['eta'] * side).astype(dtype) for side in sides]
  if within is not None:
    out = out + nn(within, Z[-1], dtype)
  yield

  kept, last_k = rows['g'][:, -1:], f.columns['last'] * f.k_CxK
  maps = []
  for box, z in zip(cfg.boxes, Z):
    at = columns_of(cfg, box, K)
    maps.append(kept * running.maps_KxM[:, at] + tn(last_k, z, dtype))
    yield
  new = Maps(
    jnp.concatenate(maps, axis=1),
    kept * running.gates_8xK + nn(rows['last'] * Zg, k, dtype),
  )
  new = tile_anchor.after(cfg, f, slow, new)
  saved = Saved(narrow(state, dtype), T, jnp.concatenate(Z, axis=1), Zg)
  return State(boundary_after(boundary, rows), new, None), out, saved


def boundary_after(boundary: Maps | None, rows):
  """The boundary, which forgets where a document began."""
  if boundary is None or 'alive' not in rows:
    return boundary
  return jax.tree.map(lambda x: rows['alive'][:, -1:] * x, boundary)


def narrow(state: State, dtype) -> State:
  def one(maps: Maps | None):
    if maps is None:
      return None
    return maps._replace(maps_KxM=maps.maps_KxM.astype(dtype))

  return State(*map(one, state))
