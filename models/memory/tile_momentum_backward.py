"""The backward pass of `tile_momentum`, by hand, up to the steps U = -eta e.

What lies before the steps is the same without momentum: `tile_backward`.
"""

import jax
import jax.numpy as jnp

from nestax.models.memory.tile_adjoint import (
  Chunk,
  Gathered,
  add_last,
  alive,
  boundary_read_back,
  entries,
  written_back,
)
from nestax.models.memory.tile_anchor_backward import output_back
from nestax.models.memory.tile_front import Maps, State
from nestax.models.memory.tile_ops import (
  adaptive,
  columns_as_rows,
  iota,
  nn,
  nt,
  outer,
  tn,
)
from nestax.models.memory.tile_push import push_back


class PushSums:
  """Gathers gradients of the weights of `tile_push`."""

  def __init__(self, c: Chunk):
    zero = jnp.zeros_like(c.f.columns['eta'])
    self.c, self.c_p, self.last_A = zero, zero, zero
    self.A = self.A_p = jnp.zeros_like(c.f.G_CxC)

  def column(self, name: str, x_CxN) -> None:
    total = jnp.sum(x_CxN, axis=1, keepdims=True)
    setattr(self, name, getattr(self, name) + total)

  def back(self, c: Chunk, d: Gathered, d_c_end) -> None:
    """Leads them to the gates, with that of c at the chunk's end."""
    at_end = iota(self.A.shape, 0) == self.A.shape[0] - 1
    last_A = columns_as_rows({'last_A': self.last_A})['last_A']
    d_A = self.A + jnp.where(at_end, last_A, 0.0)
    d_c = self.c + jnp.where(at_end[:, :1], d_c_end, 0.0)
    yield from push_back(c.f, d.sums, d_A, self.A_p, d_c, self.c_p, c.dtype)


def _from_new(c: Chunk, d: Gathered, weights: PushSums, d_state: State):
  """From fast part and momentum after the chunk: gradients of U and Z."""
  saved, p, k, columns = c.saved, c.f.push, c.f.k_CxK, c.f.columns
  d_D, d_S = d_state.running, d_state.momentum
  U = saved.U_CxM, saved.Ug_8xC
  d_U, d_Ug, d_A_k = written_back(c, p.last_A_Cx1, *U, d_D)
  yield
  by_S, by_S_g, d_b_k = written_back(c, columns['last_b'], *U, d_S)
  yield
  weights.column('last_A', d_A_k * k)
  d.sums.column('last_b', d_b_k * (columns['last_b'] * k))
  d.k = p.last_A_Cx1 * d_A_k + columns['last_b'] * d_b_k
  yield
  d_Z = d_Zg = None
  if c.cfg.delta:
    d_Z, d_Zg, d_last_k = written_back(
      c, columns['last'], saved.Z_CxM, saved.Zg_8xC, d_D
    )
    d.sums.column('last', d_last_k * (columns['last'] * k))
    d.k = d.k + columns['last'] * d_last_k
  return (d_U + by_S, d_Ug + by_S_g), (d_Z, d_Zg)


def _from_kept(c: Chunk, d_state: State):
  """What the chunk's end kept: (of D, of S, of g, of c, of b at the end)."""
  d_D, d_S = d_state.running, d_state.momentum
  g, b = c.f.rows['g'][:, -1:], c.f.rows['b'][:, -1:]
  end = c.f.push.c_Cx1[-1:]
  d_running = jax.tree.map(lambda x: g * x, d_D)
  d_momentum = jax.tree.map(lambda x, y: end * x + b * y, d_D, d_S)
  return (
    d_running,
    d_momentum,
    entries(d_running, c.running),
    entries(d_D, c.momentum),
    b * entries(d_S, c.momentum),
  )


def _from_output(c: Chunk, d: Gathered, weights: PushSums, d_out, d_U, d_Z):
  """From the output; returns the gradients of U and Z with its parts."""
  dtype, q, k, mem = c.dtype, c.f.q_CxK, c.f.k_CxK, c.mem
  if 'mem' in c.cfg.identity:
    d.q = d.q + d_out
  if c.cfg.read == 'boundary':
    boundary_read_back(c, d, d_out)
    return d_U, d_Z
  d_fast, d_push = c.f.columns['g'] * d_out, c.f.push.c_Cx1 * d_out
  d_read = nt(d_fast, c.running.maps_KxM[:, mem], dtype)
  d_pushed = nt(d_out, c.momentum.maps_KxM[:, mem], dtype)
  yield
  output_back(c, d, d_out)
  d.q = d.q + d_read + c.f.push.c_Cx1 * d_pushed
  d.sums.column('g', q * d_read)
  weights.column('c', q * d_pushed)
  d.running['mem'] = tn(q, d_fast, dtype)
  d.momentum['mem'] = tn(q, d_push, dtype)
  yield

  qk, A = nt(q, k, dtype), c.f.push.A_CxC
  by_U = nt(d_out, c.saved.U_CxM[:, mem], dtype)
  weights.A = weights.A + by_U * qk
  yield
  d_qk = A * by_U
  d_U = add_last(d_U, mem, tn(A * qk, d_out, dtype))
  yield
  if c.cfg.delta:
    by_Z = c.f.G_CxC * nt(d_out, c.saved.Z_CxM[:, mem], dtype)
    d_log_G, d_qk = by_Z * qk, d_qk + by_Z
    d.sums.column('g', d_log_G)
    d.sums.row('minus', d_log_G)
    d_Z = add_last(d_Z, mem, tn(c.f.G_CxC * qk, d_out, dtype))
  d.q = d.q + nn(d_qk, k, dtype)
  d.k = d.k + tn(d_qk, q, dtype)
  return d_U, d_Z


def _from_system(
  c: Chunk, d: Gathered, weights: PushSums, d_U, d_Ug, d_Z, d_Zg
):
  """Through `Z = T rhs`: what reaches U, and the rhs over -eta as side."""
  dtype, k, saved, p = c.dtype, c.f.k_CxK, c.saved, c.f.push
  eta, eta_1xC = c.f.columns['eta'], c.f.rows['eta']
  d_rhs = tn(saved.T_CxC, d_Z, dtype)
  d_rhs_g = nn(d_Zg, saved.T_CxC, dtype)
  yield
  d_L = -nt(d_rhs, saved.Z_CxM, dtype) - outer(d_rhs_g, saved.Zg_8xC)
  kk = nt(k, k, dtype)
  yield
  d_kk = c.f.E_CxC * d_L
  d.sums.column('row', d_kk * kk)
  d.sums.row('minus', d_kk * kk)

  side, side_g = -eta * d_rhs, -eta_1xC * d_rhs_g
  yield
  P = p.A_p_CxC * kk
  d_P = nt(side, saved.U_CxM, dtype) + outer(side_g, saved.Ug_8xC)
  weights.A_p = d_P * kk
  yield
  d.sums.column('eta', d_P * P)
  d_kk = d_kk + p.A_p_CxC * d_P
  d.k = d.k + nn(d_kk, k, dtype) + tn(d_kk, k, dtype)
  yield
  d_U = d_U + tn(P, side, dtype)
  d_Ug = d_Ug + nn(side_g, P, dtype)
  return d_U, d_Ug, (d_rhs, d_rhs_g), (side, side_g)


def _from_reads(c: Chunk, d: Gathered, weights: PushSums, side, side_g):
  """From the system's reads of the fast part and the momentum: of both."""
  cfg, dtype, k, p = c.cfg, c.dtype, c.f.k_CxK, c.f.push
  rows, columns = c.f.rows, c.f.columns
  g_p, c_p = columns['g_p'], p.c_p_Cx1
  by_D = g_p * nt(side, c.running.maps_KxM, dtype)
  yield
  by_S = nt(side, c.momentum.maps_KxM, dtype)
  yield
  d.sums.column('row', by_D * k)
  d.sums.column('eta', c_p * (by_S * k))
  weights.column('c_p', by_S * k)
  of_D, of_S = rows['g_p'] * side_g, p.c_p_1xC * side_g
  d.k = d.k + by_D + outer(of_D, c.running.gates_8xK)
  d.k = d.k + c_p * by_S + outer(of_S, c.momentum.gates_8xK)
  yield
  # gates are read in rows: their parts of the same sums
  kept = adaptive(cfg, nt(c.running.gates_8xK, k, dtype))
  d.sums.row('row', of_D * kept)
  pushed = adaptive(cfg, nt(c.momentum.gates_8xK, k, dtype))
  d.sums.row('eta', of_S * pushed)
  weights.c_p = weights.c_p + _sum_column(side_g * pushed)
  return (
    Maps(tn(g_p * k, side, dtype), nn(of_D, k, dtype)),
    Maps(tn(c_p * k, side, dtype), nn(of_S, k, dtype)),
  )


def _sum_column(rows_8xC):
  """The sum of rows as a column."""
  return jnp.sum(rows_8xC.T, axis=1, keepdims=True)


def through(c: Chunk, d: Gathered, d_state: State, d_out, point):
  """From the chunk's end to its steps: a generator, see `steps`.

  Args:
    c: the chunk.
    d: where gradients are gathered.
    d_state: of the state after the chunk.
    d_out: of the output, `[C, K]`.
    point: where the stack is read for the inner gradients, `[C, K]`.

  Returns:
    (of U `[C, M]`, of the gates' inner gradients `[8, C]`, Maps of the fast
    part and of the momentum before, both of the system's right sides, of the
    logarithms of what is kept of both).
  """
  weights = PushSums(c)
  (d_U, d_Ug), (d_Z, d_Zg) = yield from _from_new(c, d, weights, d_state)
  yield
  d_running, d_momentum, d_g, d_c, d_b = _from_kept(c, d_state)
  of_system = None, None
  d_U, d_Z = yield from _from_output(c, d, weights, d_out, d_U, d_Z)
  yield
  if c.cfg.delta:
    d_U, d_Ug, of_system, side = yield from _from_system(
      c, d, weights, d_U, d_Ug, d_Z, d_Zg
    )
    yield
    of_both = yield from _from_reads(c, d, weights, *side)
    yield
    d_running, d_momentum = jax.tree.map(
      jnp.add, (d_running, d_momentum), of_both
    )
  yield from weights.back(c, d, d_c)
  yield
  d.sums.row('eta', d_Ug * c.saved.Ug_8xC)
  e_g = -c.f.rows['eta'] * d_Ug
  if not c.apart:
    at_boundary = -alive(c, c.f.columns['eta']) * point
    by_gates = nn(e_g * c.f.rows.get('alive', 1.0), point, c.dtype)
    at = Maps(tn(at_boundary, d_U, c.dtype), by_gates)
    d_running = jax.tree.map(jnp.add, d_running, at)
  return d_U, e_g, d_running, d_momentum, of_system, d_g, d_b
