"""The backward pass of `tile`, by hand, from the end to the front.

`d_x` is the gradient of x. What the parts gather of the fast and slow values
is added up in `Gathered`; gradients of the gates go to `tile_gates`.
"""

import jax
import jax.numpy as jnp

from nestax.models.memory import (
  tile,
  tile_anchor_backward,
  tile_momentum_backward,
)
from nestax.models.memory.tile_adjoint import (
  Chunk,
  Gathered,
  add_last,
  alive,
  at_gates,
  boundary_read_back,
  entries,
  place,
  projections_back,
  widen,
  written_back,
)
from nestax.models.memory.tile_front import Maps, State, Tokens, front_steps
from nestax.models.memory.tile_gates import gates_back
from nestax.models.memory.tile_ops import (
  adaptive,
  columns_of,
  exact,
  nn,
  nt,
  outer,
  tn,
  tns,
)


def _from_new(c: Chunk, d: Gathered, d_new: Maps):
  """From the new fast parts: gradients of Z, of Zg, of the parts before.

  The last is of what they were multiplied by.
  """
  weight = c.f.columns['last']
  d_Z, d_Zg, d_last_k = written_back(
    c, weight, c.saved.Z_CxM, c.saved.Zg_8xC, d_new
  )
  d.k = weight * d_last_k
  d.sums.column('last', d_last_k * (weight * c.f.k_CxK))
  kept = c.f.rows['g'][:, -1:]
  d_running = jax.tree.map(lambda x: kept * x, d_new)
  return d_Z, d_Zg, d_running, entries(d_running, c.running)


def _from_output(c: Chunk, d: Gathered, d_out, d_Z):
  """From the output; returns the gradient of Z with its part."""
  cfg, dtype, q, k, g = c.cfg, c.dtype, c.f.q_CxK, c.f.k_CxK, c.f.columns['g']
  if 'mem' in cfg.identity:
    d.q = d.q + d_out
  if cfg.read == 'boundary':
    boundary_read_back(c, d, d_out)
    return d_Z
  qk = nt(q, k, dtype)
  d_read = g * nt(d_out, c.running.maps_KxM[:, c.mem], dtype)
  yield
  tile_anchor_backward.output_back(c, d, d_out)
  d.q = d.q + d_read
  d.sums.column('g', q * d_read)
  d.running['mem'], d_Z_mem = tns((g * q, c.f.G_CxC * qk), d_out, dtype)
  yield
  d_qk = c.f.G_CxC * nt(d_out, c.saved.Z_CxM[:, c.mem], dtype)
  d_log_G = d_qk * qk
  yield
  d.sums.column('g', d_log_G)
  d.sums.row('minus', d_log_G)
  d.q = d.q + nn(d_qk, k, dtype)
  d.k = d.k + tn(d_qk, q, dtype)
  return add_last(d_Z, c.mem, d_Z_mem)


def _from_system(c: Chunk, d: Gathered, d_Z, d_Zg):
  """Through `Z = T rhs`: gradients of both right-hand sides."""
  if not c.cfg.delta:
    return d_Z, d_Zg
  k = c.f.k_CxK
  d_rhs = tn(c.saved.T_CxC, d_Z, c.dtype)
  d_rhs_g = nn(d_Zg, c.saved.T_CxC, c.dtype)
  yield
  d_L = -nt(d_rhs, c.saved.Z_CxM, c.dtype) - outer(d_rhs_g, c.saved.Zg_8xC)
  d_kk = c.f.E_CxC * d_L
  d_log_E = d_kk * nt(k, k, c.dtype)
  yield
  d.sums.column('row', d_log_E)
  d.sums.row('minus', d_log_E)
  d.k = d.k + nn(d_kk + d_kk.T, k, c.dtype)
  return d_rhs, d_rhs_g


def _from_kept(c: Chunk, d: Gathered, d_rhs, d_rhs_g, point, d_running):
  """From the right-hand sides' reads of the running parts; returns theirs."""
  cfg, dtype, k = c.cfg, c.dtype, c.f.k_CxK
  rows, columns = c.f.rows, c.f.columns
  first, second = tile.gate_terms(
    cfg, c.slow, c.boundary, c.running, point, k, rows, dtype
  )
  d.sums.row('eta', d_rhs_g * first)
  e_g = -rows['eta'] * d_rhs_g
  lhs, (maps, gates, _) = None, d_running
  if cfg.delta:
    s_g = -rows['eta_g'] * d_rhs_g
    kept_part = -columns['eta_g'] * nt(d_rhs, c.running.maps_KxM, dtype)
    d.k = d.k + kept_part + outer(s_g, c.running.gates_8xK)
    yield
    d.sums.column('row', kept_part * k)
    d.sums.row('row', d_rhs_g * second)
    lhs = -columns['eta_g'] * k
    gates = gates + nn(s_g, k, dtype)
  if not c.apart:
    # both of the running parts' reads in one product
    at_boundary = alive(c, columns['eta']) * point
    lhs = -at_boundary if lhs is None else lhs - at_boundary
    gates = gates + nn(e_g * rows.get('alive', 1.0), point, dtype)
  if lhs is not None:
    maps = maps + tn(lhs, d_rhs, dtype)
  return Maps(maps, gates), e_g


def _from_errors(c: Chunk, d: Gathered, d_rhs, e_g, point):
  """From the inner gradients, read at the boundary: of slow and boundary.

  The boundary's are zero where it is the running parts: `_from_kept` has them.
  """
  cfg, dtype, eta = c.cfg, c.dtype, c.f.columns['eta']
  slow, boundary = c.slow.maps_KxM, c.boundary.maps_KxM
  if c.f.alive_Cx1 is None:
    d_point = nt(d_rhs, slow + boundary, dtype)
  else:
    d_point = nt(d_rhs, slow, dtype)
    d_point = d_point + c.f.alive_Cx1 * nt(d_rhs, boundary, dtype)
  d_point = -eta * d_point
  yield
  d_slow = Maps(tn(-eta * point, d_rhs, dtype), nn(e_g, point, dtype))
  d_boundary = jax.tree.map(jnp.zeros_like, d_slow)
  yield
  if c.apart:
    d_boundary = Maps(
      tn(-alive(c, eta) * point, d_rhs, dtype),
      nn(e_g * c.f.rows.get('alive', 1.0), point, dtype),
    )
  of_k = of_v = jnp.zeros_like(point)
  for box in cfg.boxes:
    part = d_rhs[:, columns_of(cfg, box, c.K)]
    of_v = of_v + part
    if cfg.objective == 'l2' and box in cfg.identity:
      of_k = of_k + part
  d_e_k, d_e_v = -eta * of_k, eta * of_v
  d.sums.column('eta', d_point * point + d_e_k * c.f.k_CxK + d_e_v * c.f.v_CxK)
  d_point = d_point + at_gates(c, e_g)
  d.k = d.k + d_e_k
  d.v = d_e_v
  if cfg.objective == 'l2':
    d.k = d.k + d_point
  if cfg.generated:
    d.v = d.v - d_point
  return d_slow, d_boundary


def backward_steps(
  cfg, slow, bias_8x1, saved, tokens, d_state: State, d_out, dtype
):
  """Gradients of one chunk: a generator, see `steps`.

  Args:
    cfg, slow, bias_8x1, tokens, dtype: as the forward pass had them.
    saved: what it saved.
    d_state: of the state after the chunk.
    d_out: of the output, `[C, K]`, float32.

  Returns:
    (State before, of the slow values, of the gates' logits `[8, C]`, Tokens).
  """
  K, apart = tokens.key_CxK.shape[1], saved.state.boundary is not None
  running = widen(saved.state.running, d_out)
  boundary = widen(saved.state.boundary, d_out) if apart else running
  f = yield from front_steps(cfg, slow, bias_8x1, boundary, tokens, dtype)
  yield
  mem = columns_of(cfg, 'mem', K)
  momentum = widen(saved.state.momentum, d_out)
  c = Chunk(
    cfg, dtype, slow, boundary, running, momentum, apart, saved, tokens, f,
    mem, K,
  )  # fmt: skip
  d = Gathered(f.q_CxK)
  point = tile.inner_point(cfg, f.k_CxK, f.v_CxK)

  if cfg.momentum:
    through = yield from tile_momentum_backward.through(
      c, d, d_state, d_out, point
    )
    d_U, e_g, d_running, d_momentum, of_system, *d_kept = through
  else:
    d_Z, d_Zg, d_running, d_kept = _from_new(c, d, d_state.running)
    yield
    d_Z = yield from _from_output(c, d, d_out, d_Z)
    yield
    d_U, d_Ug = yield from _from_system(c, d, d_Z, d_Zg)
    yield
    d_running, e_g = yield from _from_kept(c, d, d_U, d_Ug, point, d_running)
    of_system = (d_U, d_Ug) if cfg.delta else (None, None)
    yield
    d_momentum, d_kept = None, (d_kept, None)
  d_slow, d_before = yield from _from_errors(c, d, d_U, e_g, point)
  yield
  if cfg.anchor == 'zero':
    of_left = tile_anchor_backward.back(c, d, d_state.running, *of_system)
    d_slow = jax.tree.map(jnp.add, d_slow, of_left)
  d_logit, d_handed = gates_back(cfg, f, d.sums.all_rows(), *d_kept, tokens)
  d_query, d_key, d_value = yield from projections_back(c, d)
  yield
  d_key = d_key + at_gates(c, d_logit)

  alive_logit = d_logit * f.rows.get('alive', 1.0)
  by_gates = exact(d_logit, tokens.key_CxK)
  by_boundary = adaptive(cfg, exact(alive_logit, tokens.key_CxK))
  like = slow.maps_KxM[:, mem]

  def add(maps: Maps, parts, gates=0.0):
    if parts:
      placed = place(parts, cfg.boxes, like)
      maps = maps._replace(maps_KxM=maps.maps_KxM + placed)
    return maps._replace(gates_8xK=maps.gates_8xK + gates)

  d_slow = add(d_slow, d.slow, by_gates)
  d_before = add(d_before, d.boundary, by_boundary)
  d_running = add(d_running, d.running)
  if cfg.momentum:
    d_momentum = add(d_momentum, d.momentum)
  if not apart:
    d_running, d_before = jax.tree.map(jnp.add, d_running, d_before), None
  else:
    after = 1.0 if f.alive_Cx1 is None else f.rows['alive'][:, -1:]
    d_before = jax.tree.map(
      lambda x, y: x + after * y, d_before, d_state.boundary
    )
  d_tokens = Tokens(d_query, d_key, d_value, None, d_handed)
  return State(d_before, d_running, d_momentum), d_slow, d_logit, d_tokens
