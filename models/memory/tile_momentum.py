"""A chunk of matrix memories with momentum on tiles, forward.

With U = -eta e, T and the weights of `tile_push`, for every memory

  Z = -T (eta .) (g_p k D + c_p k S + (A_p * k k^T) U)
  D_C = g D + c S + (A_C k)^T U + (G_C k)^T Z      S_C = b S + (B_C k)^T U
  o = q W + g q D + c q S + (A * q k^T) U + (G * q k^T) Z

and no Z without `delta`. For the rest see `tile`.
"""

import jax.numpy as jnp

from nestax.models.memory import tile, tile_anchor
from nestax.models.memory.steps import beside
from nestax.models.memory.tile import Saved
from nestax.models.memory.tile_front import Maps, State, front_steps, reach
from nestax.models.memory.tile_ops import adaptive, columns_of, nn, nt, tn


def _steps(cfg, f, slow, at_boundary, point, dtype):
  """U, a list by box of `[C, K]`; a generator of steps."""
  steps = []
  for e in tile.errors(cfg, f, slow, at_boundary, point, dtype):
    steps.append((-f.columns['eta'] * e).astype(dtype))
    yield
  return steps


def _solved(cfg, f, slow, k, state: State, U, T, P, dtype):
  """Z by box, in the matmuls' dtype; a generator of steps."""
  # a row times T, where a column times each side would be moved over lanes
  solve = (-f.rows['eta'] * T).astype(dtype)
  yield
  Z = []
  for box, steps in zip(cfg.boxes, U):
    at = columns_of(cfg, box, k.shape[1])
    side = f.columns['g_p'] * nn(k, state.running.maps_KxM[:, at], dtype)
    side = side + f.push.c_p_Cx1 * nn(k, state.momentum.maps_KxM[:, at], dtype)
    side = side + nn(P, steps, dtype)
    side = tile_anchor.add_side(cfg, f, side, slow.maps_KxM[:, at], k, dtype)
    yield
    Z.append(nn(solve, side, dtype).astype(dtype))
    yield
  return Z


def gate_sides(cfg, f, momentum: Maps, k, Ug, P, dtype):
  """Of the gates' system: what momentum adds over -eta, `[8, C]` twice."""
  by_state = adaptive(cfg, nt(momentum.gates_8xK, k, dtype))
  return f.push.c_p_1xC * by_state, nt(Ug, P, dtype)


def new_gates(f, state: State, Ug, Zg, k, dtype):
  """The gates' rows `[8, K]` of fast part and momentum after the chunk."""
  D, S = state.running.gates_8xK, state.momentum.gates_8xK
  steps = f.push.last_A_1xC * Ug
  if Zg is not None:
    steps = steps + f.rows['last'] * Zg
  D = f.rows['g'][:, -1:] * D + f.push.c_Cx1[-1:] * S + nn(steps, k, dtype)
  S = f.rows['b'][:, -1:] * S + nn(f.rows['last_b'] * Ug, k, dtype)
  return D, S


def _written(cfg, f, state: State, U, Z, Ug, Zg, k, dtype):
  """(fast part, momentum) after the chunk; a generator of steps."""
  columns, k_CxK = f.columns, f.k_CxK
  A_k, b_k = f.push.last_A_Cx1 * k_CxK, columns['last_b'] * k_CxK
  A_k, b_k = A_k.astype(dtype), b_k.astype(dtype)
  last_k = (columns['last'] * k_CxK).astype(dtype)
  kept, kept_b = f.rows['g'][:, -1:], f.rows['b'][:, -1:]
  pushed = f.push.c_Cx1[-1:]
  D_new, S_new = [], []
  for i, box in enumerate(cfg.boxes):
    at = columns_of(cfg, box, k.shape[1])
    S = state.momentum.maps_KxM[:, at]
    D = kept * state.running.maps_KxM[:, at] + pushed * S
    D = D + tn(A_k, U[i], dtype)
    D_new.append(D if Z is None else D + tn(last_k, Z[i], dtype))
    yield
    S_new.append(kept_b * S + tn(b_k, U[i], dtype))
    yield
  gates = new_gates(f, state, Ug, Zg, k, dtype)
  maps = jnp.concatenate(D_new, axis=1), jnp.concatenate(S_new, axis=1)
  return tuple(map(Maps, maps, gates))


def forward_steps(cfg, slow: Maps, bias_8x1, state: State, tokens, dtype):
  """`tile.forward_steps` with momentum."""
  boundary, running, momentum = state
  at_boundary = running if boundary is None else boundary
  f = yield from front_steps(
    cfg, slow, bias_8x1, at_boundary, tokens, dtype, ahead=True
  )
  yield
  k = f.k_CxK.astype(dtype)
  point = tile.inner_point(cfg, f.k_CxK, f.v_CxK).astype(dtype)

  def reads():
    G = reach(f.rows, f.columns)
    yield
    out, qk = yield from tile.read_before(
      cfg, f, slow, at_boundary, running, k, dtype
    )
    U = yield from _steps(cfg, f, slow, at_boundary, point, dtype)
    of_gates = tile.gate_terms(
      cfg, slow, at_boundary, running, point, k, f.rows, dtype
    )
    return out, qk, G, U, of_gates

  (out, qk, G, U, (Ug, kept_g)), T = yield from beside(
    reads(), tile.inverse(cfg, f, k, dtype)
  )
  Z = Zg = None
  if cfg.delta:
    P = (f.push.A_p_CxC * nt(k, k, dtype)).astype(dtype)
    Z = yield from _solved(cfg, f, slow, k, state, U, T, P, dtype)
    T = T.astype(dtype)
    pushed_g = sum(gate_sides(cfg, f, momentum, k, Ug, P, dtype))
    side_g = kept_g - f.rows['eta'] * pushed_g
    side_g = tile_anchor.add_gate_side(cfg, f, side_g, slow, k, dtype)
    Zg = nt(side_g, T, dtype)
  if qk is not None:
    mem = columns_of(cfg, 'mem', k.shape[1])
    read = nn(f.q_CxK, momentum.maps_KxM[:, mem], dtype)
    out = out + f.push.c_Cx1 * read
    yield
    out = out + nn(f.push.A_CxC * qk, U[-1], dtype)
    yield
    if cfg.delta:
      out = out + nn(G * qk, Z[-1], dtype)
  yield
  new = yield from _written(cfg, f, state, U, Z, Ug, Zg, k, dtype)

  def whole(parts):
    return None if parts is None else jnp.concatenate(parts, axis=1)

  saved = Saved(tile.narrow(state, dtype), T, whole(Z), Zg, whole(U), Ug)
  D = tile_anchor.after(cfg, f, slow, new[0])
  after = State(tile.boundary_after(boundary, f.rows), D, new[1])
  return after, out, saved
