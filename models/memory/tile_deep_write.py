"""What a chunk writes into one memory on tiles, and what is read of it inside.

The equations are `chunk.write`'s and `chunk.read_running`'s for any keys: those
of all first layers, or one second layer's own.
"""

from typing import NamedTuple

import jax

from nestax.models.memory import tile, tile_anchor, tile_momentum
from nestax.models.memory.inverse import inverse_steps
from nestax.models.memory.tile_deep_ops import solve, solve_rows
from nestax.models.memory.tile_front import Front
from nestax.models.memory.tile_ops import nn, nt, tn


class Keys(NamedTuple):
  """Keys of some memories, and their system."""

  key_CxN: jax.Array
  L_CxC: jax.Array | None
  T_CxC: jax.Array | None
  P_CxC: jax.Array | None  # with momentum, `A_p * k k^T`


class Written(NamedTuple):
  """One memory before a chunk, and what the chunk writes into it."""

  slow: jax.Array
  fast: jax.Array
  momentum: jax.Array | None
  U: jax.Array
  Z: jax.Array | None  # with U where there is no momentum


def keys_steps(cfg, f: Front, key, T, dtype):
  """Keys; T is the inverse where it is known. A generator of steps."""
  if not cfg.delta:
    return Keys(key, None, None, None)
  kk = nt(key, key, dtype)
  L = f.E_CxC * kk
  P = f.push.A_p_CxC * kk if cfg.momentum else None
  yield
  if T is None:
    T = yield from inverse_steps(L, dtype)
  return Keys(key, L, T.astype(dtype), P)


def write_steps(cfg, f: Front, keys: Keys, slow, fast, momentum, e, dtype):
  """(Written, fast part, momentum); e the inner gradients. Steps."""
  columns, key = f.columns, keys.key_CxN
  U = Z = -columns['eta'] * e
  yield
  if cfg.delta:
    side = columns['g_p'] * nn(key, fast, dtype)
    side = tile_anchor.add_side(cfg, f, side, slow, key, dtype)
    yield
    if cfg.momentum:
      side = side + f.push.c_p_Cx1 * nn(key, momentum, dtype)
      side = side + nn(keys.P_CxC, U, dtype)
      yield
    rhs = -columns['eta'] * side
    rhs = rhs if cfg.momentum else U + rhs
    Z = solve(keys.L_CxC, keys.T_CxC, rhs, dtype)
    yield
  elif cfg.momentum:
    Z = None
  new = f.rows['g'][:, -1:] * fast
  if Z is not None:
    new = new + tn(columns['last'] * key, Z, dtype)
    yield
  if cfg.anchor == 'zero':
    new = new + (f.rows['anchor'][:, -1:] - 1.0) * slow
  pushed = None
  if cfg.momentum:
    new = new + f.push.c_Cx1[-1:] * momentum
    new = new + tn(f.push.last_A_Cx1 * key, U, dtype)
    yield
    pushed = f.rows['b'][:, -1:] * momentum
    pushed = pushed + tn(columns['last_b'] * key, U, dtype)
    yield
  return Written(slow, fast, momentum, U, Z), new, pushed


def running_steps(cfg, f: Front, keys: Keys, written: Written, q, dtype):
  """Queries read from a memory as it is after each token. Steps."""
  out = tile_anchor.read(cfg, f, written.slow, q, dtype)
  out = out + f.columns['g'] * nn(q, written.fast, dtype)
  yield
  qk = nt(q, keys.key_CxN, dtype)
  if written.Z is not None:
    out = out + nn(f.G_CxC * qk, written.Z, dtype)
    yield
  if cfg.momentum:
    out = out + f.push.c_Cx1 * nn(q, written.momentum, dtype)
    out = out + nn(f.push.A_CxC * qk, written.U, dtype)
    yield
  return out


def write_gates(cfg, f: Front, keys: Keys, slow, boundary, state, dtype):
  """The gates' rows `[8, K]` of fast part and momentum after the chunk."""
  k, running, momentum = f.k_CxK, state.running, state.momentum
  point = tile.inner_point(cfg, k, f.v_CxK)
  U, side = tile.gate_terms(
    cfg, slow, boundary, running, point, k, f.rows, dtype
  )
  Z = None if cfg.momentum else U
  if cfg.delta:
    side = tile_anchor.add_gate_side(cfg, f, side, slow, k, dtype)
    if cfg.momentum:
      pushed = tile_momentum.gate_sides(
        cfg, f, momentum, k, U, keys.P_CxC, dtype
      )
      side = side - f.rows['eta'] * sum(pushed)
    else:
      side = U + side
    Z = solve_rows(keys.L_CxC, keys.T_CxC, side, dtype)
  if cfg.momentum:
    new, pushed = tile_momentum.new_gates(f, state, U, Z, k, dtype)
  else:
    new = f.rows['g'][:, -1:] * running.gates_8xK
    new, pushed = new + nn(f.rows['last'] * Z, k, dtype), None
  if cfg.anchor == 'zero':
    lost = f.rows['anchor'][:, -1:] - 1.0
    new = new + lost * tile_anchor.own(cfg, slow).gates_8xK
  return new, pushed
