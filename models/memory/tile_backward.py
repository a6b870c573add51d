"""The backward pass of `tile.forward`, by hand.

`d_x` is the gradient of x. Gradients of a token's scalars are gathered as
columns where they come from maps and as rows where they come from gates, all
of logarithms: every product of gates is the exponential of a difference of
`total` at two tokens, and its gradient a difference of row and column sums.
"""

import jax
import jax.numpy as jnp

from nestax.models.memory import tile
from nestax.models.memory.tile import Maps, nn, nt, tn


class _Sums:
  """Gathers gradients of log gates: name -> list of `[C, 1]` or `[1, C]`."""

  def __init__(self):
    self.columns, self.rows = {}, {}

  def column(self, name, x_CxN):
    total = jnp.sum(x_CxN, axis=1, keepdims=True)
    self.columns[name] = self.columns.get(name, 0.0) + total

  def row(self, name, x_NxC):
    total = jnp.sum(x_NxC, axis=0, keepdims=True)
    self.rows[name] = self.rows.get(name, 0.0) + total

  def all_rows(self):
    """Everything as rows: one transposition."""
    names = list(self.columns)
    C = self.columns[names[0]].shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (C, tile.ROWS), 1)
    turned = jnp.zeros((C, tile.ROWS), self.columns[names[0]].dtype)
    for i, name in enumerate(names):
      turned = jnp.where(lane == i, self.columns[name], turned)
    turned = turned.T
    rows = dict(self.rows)
    for i, name in enumerate(names):
      rows[name] = rows.get(name, 0.0) + turned[i : i + 1]
    return rows


def _read_back(d_out, x, slow, fast, alive, dtype):
  """Of `tile._read`: gradients of x, of the slow and of the fast part."""
  if alive is None:
    d_maps = tn(x, d_out, dtype)
    return nt(d_out, slow + fast, dtype), d_maps, d_maps
  d_fast = alive * d_out
  d_x = nt(d_out, slow, dtype) + nt(d_fast, fast, dtype)
  return d_x, tn(x, d_out, dtype), tn(x, d_fast, dtype)


def _outer(rows_8xC, gates_8xK):
  """`rows^T gates` of the two gates' rows."""
  columns = rows_8xC.T
  return columns[:, 0:1] * gates_8xK[0:1] + columns[:, 1:2] * gates_8xK[1:2]


def _unit_back(d_y, y, norm):
  return norm * (d_y - y * jnp.sum(d_y * y, axis=1, keepdims=True))


def _place(parts, boxes, like):
  """Maps `[K, K]` of some boxes side by side, zeros for the others."""
  zero = jnp.zeros_like(like)
  return jnp.concatenate([parts.get(box, zero) for box in boxes], axis=1)


def _solve_back(cfg, saved, d_Z, d_Zg, dtype):
  """Through `Z = T rhs`: gradients of both right-hand sides, and of L."""
  if not cfg.delta:
    return d_Z, d_Zg, None
  d_rhs = tn(saved.T_CxC, d_Z, dtype)
  d_rhs_g = nn(d_Zg, saved.T_CxC, dtype)
  d_L = -nt(d_rhs, saved.Z_CxM, dtype) - _outer_rows(d_rhs_g, saved.Zg_8xC)
  return d_rhs, d_rhs_g, d_L


def _outer_rows(a_8xC, b_8xC):
  columns = a_8xC.T
  return columns[:, 0:1] * b_8xC[0:1] + columns[:, 1:2] * b_8xC[1:2]


def backward(
  cfg, slow, bias_8x1, saved, tokens, d_boundary, d_new, d_out, dtype
):
  """Gradients of one chunk.

  Args:
    cfg, slow, bias_8x1, tokens, dtype: as `tile.forward` had them.
    saved: what it saved.
    d_boundary: of the boundary after the chunk; None as there.
    d_new: of the running parts after the chunk.
    d_out: of the output, `[C, K]`, float32.

  Returns:
    (of the boundary before or None, of the running parts before, of the slow
    values, of the gates' logits `[8, C]`, of query, key and value).
  """
  K = tokens.key_CxK.shape[1]
  running = saved.running._replace(
    maps_KxM=saved.running.maps_KxM.astype(d_out.dtype)
  )
  boundary = running
  if saved.boundary is not None:
    boundary = saved.boundary._replace(
      maps_KxM=saved.boundary.maps_KxM.astype(d_out.dtype)
    )
  f = tile.front(cfg, slow, bias_8x1, boundary, tokens, dtype)
  q, k, v, rows, columns = f.q_CxK, f.k_CxK, f.v_CxK, f.rows, f.columns
  C = q.shape[0]
  mem = tile._columns_of(cfg, 'mem', K)
  sums = _Sums()
  d_q = jnp.zeros_like(q)

  # the new fast parts
  last_k = columns['last'] * k
  d_Z = nn(last_k, d_new.maps_KxM, dtype)
  d_Zg = nt(d_new.gates_8xK, last_k, dtype)
  d_last_k = nt(saved.Z_CxM, d_new.maps_KxM, dtype)
  d_last_k = d_last_k + _outer(saved.Zg_8xC, d_new.gates_8xK)
  d_k = columns['last'] * d_last_k
  sums.column('last', d_last_k * last_k)
  kept = rows['g'][:, C - 1 :]
  d_running = jax.tree.map(lambda x: kept * x, d_new)
  d_kept = jnp.sum(d_running.maps_KxM * running.maps_KxM, axis=0, keepdims=True)
  d_kept = jnp.sum(d_kept, axis=1, keepdims=True)
  d_gate = jnp.sum(d_running.gates_8xK * running.gates_8xK, 0, keepdims=True)
  d_kept = d_kept + jnp.sum(d_gate, axis=1, keepdims=True)

  # the output
  mem_slow, mem_boundary = {}, {}
  mem_running = {}
  if 'mem' in cfg.identity:
    d_q = d_q + d_out
  if cfg.read == 'token':
    Z_mem = saved.Z_CxM[:, mem]
    d_fast = columns['g'] * d_out
    qk = nt(q, k, dtype)
    d_read = nt(d_fast, running.maps_KxM[:, mem], dtype)
    d_q = d_q + nt(d_out, slow.maps_KxM[:, mem], dtype) + d_read
    sums.column('g', q * d_read)
    mem_slow['mem'] = tn(q, d_out, dtype)
    mem_running['mem'] = tn(q, d_fast, dtype)
    d_qk = f.G_CxC * nt(d_out, Z_mem, dtype)
    d_log_G = d_qk * qk
    sums.column('g', d_log_G)
    sums.row('minus', d_log_G)
    d_q = d_q + nn(d_qk, k, dtype)
    d_k = d_k + tn(d_qk, q, dtype)
    d_Z_mem = tn(f.G_CxC * qk, d_out, dtype)
    d_Z = jnp.concatenate([d_Z[:, : mem.start], d_Z[:, mem] + d_Z_mem], axis=1)
  else:
    d_x, mem_slow['mem'], mem_boundary['mem'] = _read_back(
      d_out,
      q,
      slow.maps_KxM[:, mem],
      boundary.maps_KxM[:, mem],
      f.alive_Cx1,
      dtype,
    )
    d_q = d_q + d_x

  # the system
  d_rhs, d_rhs_g, d_L = _solve_back(cfg, saved, d_Z, d_Zg, dtype)
  if d_L is not None:
    d_kk = f.E_CxC * d_L
    d_log_E = d_kk * nt(k, k, dtype)
    sums.column('row', d_log_E)
    sums.row('minus', d_log_E)
    d_k = d_k + nn(d_kk, k, dtype) + tn(d_kk, k, dtype)

  # the right-hand side, its read of the running parts
  point = tile._point(cfg, k, v)
  first, second = tile._gate_terms(
    cfg, slow, boundary, running, point, k, rows, dtype
  )
  sums.row('eta', d_rhs_g * first)
  e_g = -rows['eta'] * d_rhs_g
  eta, eta_g = columns['eta'], columns['eta_g']
  d_running_maps, d_running_gates = d_running
  alive_eta = eta if f.alive_Cx1 is None else eta * f.alive_Cx1
  if cfg.delta:
    d_kept_k = nt(d_rhs, running.maps_KxM, dtype)
    s_g = -rows['eta_g'] * d_rhs_g
    kept_part = -eta_g * d_kept_k
    d_k = d_k + kept_part + _outer(s_g, running.gates_8xK)
    sums.column('row', kept_part * k)
    sums.row('row', d_rhs_g * second)
    lhs = -eta_g * k
    if saved.boundary is None:
      # both of the running parts' reads in one product
      lhs = lhs - alive_eta * point
      gate_lhs = nn(e_g * rows.get('alive', 1.0), point, dtype)
      d_running_gates = d_running_gates + gate_lhs
    d_running_maps = d_running_maps + tn(lhs, d_rhs, dtype)
    d_running_gates = d_running_gates + nn(s_g, k, dtype)
  elif saved.boundary is None:
    d_running_maps = d_running_maps - tn(alive_eta * point, d_rhs, dtype)
    d_running_gates = d_running_gates + nn(
      e_g * rows.get('alive', 1.0), point, dtype
    )

  # its inner gradients, read at the boundary
  if f.alive_Cx1 is None:
    d_point = nt(d_rhs, slow.maps_KxM + boundary.maps_KxM, dtype)
  else:
    d_point = nt(d_rhs, slow.maps_KxM, dtype)
    d_point = d_point + f.alive_Cx1 * nt(d_rhs, boundary.maps_KxM, dtype)
  d_point = -eta * d_point
  d_slow_maps = tn(-eta * point, d_rhs, dtype)
  d_slow_gates = nn(e_g, point, dtype)
  d_boundary_maps = jnp.zeros_like(d_slow_maps)
  d_boundary_gates = jnp.zeros_like(d_slow_gates)
  if saved.boundary is not None:
    d_boundary_maps = tn(-alive_eta * point, d_rhs, dtype)
    d_boundary_gates = nn(e_g * rows.get('alive', 1.0), point, dtype)
  of_k = of_v = jnp.zeros_like(k)
  for box in cfg.boxes:
    part = d_rhs[:, tile._columns_of(cfg, box, K)]
    of_v = of_v + part
    if cfg.objective == 'l2' and box in cfg.identity:
      of_k = of_k + part
  d_e_k, d_e_v = -eta * of_k, eta * of_v
  sums.column('eta', d_point * point + d_e_k * k + d_e_v * v)
  if f.alive_Cx1 is None:
    d_point = d_point + _outer(e_g, slow.gates_8xK + boundary.gates_8xK)
  else:
    d_point = d_point + _outer(e_g, slow.gates_8xK)
    d_point = d_point + f.alive_Cx1 * _outer(e_g, boundary.gates_8xK)
  d_k = d_k + d_e_k
  d_v = d_e_v
  if cfg.objective == 'l2':
    d_k = d_k + d_point
  if cfg.generated:
    d_v = d_v - d_point

  # the gates
  d_logit = _gates_back(cfg, f, sums.all_rows(), d_kept, tokens)
  if f.alive_Cx1 is None:
    d_key = _outer(d_logit, slow.gates_8xK + boundary.gates_8xK)
  else:
    d_key = _outer(d_logit, slow.gates_8xK)
    d_key = d_key + f.alive_Cx1 * _outer(d_logit, boundary.gates_8xK)
  alive_logit = d_logit * rows.get('alive', 1.0)
  d_slow_gates = d_slow_gates + tile.exact(d_logit, tokens.key_CxK)
  d_boundary_gates = d_boundary_gates + tile._adaptive(
    cfg, tile.exact(alive_logit, tokens.key_CxK)
  )

  # the projections
  raw = {'q': d_q, 'k': d_k, 'v': d_v}
  inputs = {
    'q': (q, f.norms[0], tokens.query_CxK),
    'k': (k, f.norms[1], tokens.key_CxK),
    'v': (v, f.norms[2], tokens.value_CxK),
  }
  d_tokens = {}
  for box, (y, norm, x) in inputs.items():
    d_y = raw[box] if norm is None else _unit_back(raw[box], y, norm)
    d_tokens[box] = d_y
    if box in cfg.boxes:
      at = tile._columns_of(cfg, box, K)
      d_x, mem_slow[box], mem_boundary[box] = _read_back(
        d_y, x, slow.maps_KxM[:, at], boundary.maps_KxM[:, at],
        f.alive_Cx1, dtype,
      )  # fmt: skip
      d_tokens[box] = d_x + d_y if box in cfg.identity else d_x
  d_tokens['k'] = d_tokens['k'] + d_key

  like = slow.maps_KxM[:, mem]
  d_slow_maps = d_slow_maps + _place(mem_slow, cfg.boxes, like)
  d_boundary_maps = d_boundary_maps + _place(mem_boundary, cfg.boxes, like)
  if mem_running:
    d_running_maps = d_running_maps + _place(mem_running, cfg.boxes, like)
  if saved.boundary is None:
    d_running_maps = d_running_maps + d_boundary_maps
    d_running_gates = d_running_gates + d_boundary_gates
    d_before = None
  else:
    after = 1.0 if f.alive_Cx1 is None else rows['alive'][:, C - 1 :]
    d_before = Maps(
      d_boundary_maps + after * d_boundary.maps_KxM,
      d_boundary_gates + after * d_boundary.gates_8xK,
    )
  return (
    d_before,
    Maps(d_running_maps, d_running_gates),
    Maps(d_slow_maps, d_slow_gates),
    d_logit,
    tuple(d_tokens[box] for box in ('q', 'k', 'v')),
  )


def _gates_back(cfg, f, sums, d_kept, tokens):
  """Gradients of the logits from those of the gates' products."""
  C = f.q_CxK.shape[0]
  zero = jnp.zeros_like(f.rows['total'])
  d_last, d_g = sums['last'], sums.get('g', zero)
  d_row, d_minus = sums.get('row', zero), sums.get('minus', zero)
  end = jnp.sum(d_last, axis=1, keepdims=True) + d_kept
  at_end = jax.lax.broadcasted_iota(jnp.int32, zero.shape, 1) == C - 1
  d_total = d_g - d_minus - d_last + d_row + jnp.where(at_end, end, 0.0)
  # total and before are sums of log alpha; before leaves out the token itself
  triangle = tile._ones_triangle(C, d_total.dtype)
  stacked = tile._stack([d_total], d_total.dtype)
  d_alpha = tile.exact(stacked, triangle, ((1,), (1,)))[0:1] - d_row
  d_eta = sums['eta'] + d_row
  if not cfg.retention:
    d_alpha = zero
  if tokens.marks_2xC is not None:
    live = tokens.marks_2xC[1:2] != 0
    d_alpha, d_eta = jnp.where(live, d_alpha, 0.0), jnp.where(live, d_eta, 0.0)
  d_log = tile._stack([d_eta, d_alpha], d_total.dtype)
  return d_log * jax.nn.sigmoid(-f.logit_8xC)
