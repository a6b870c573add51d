"""A chunk of tokens in a few matmuls: the single source of truth for speed.

One head of one sequence; rows are tokens. With `G[t, i]` the product of alpha
over (i, t], `B` the same for beta, `A = G B`, and `U = -eta e` (all lower
triangular; `_p`: up to the token before), the recurrence of `token.py` is

  (I + diag(eta) (G_p * K K^T)) Z
      = -diag(eta) (g_p K D^T + c_p K S^T + (A_p * K K^T) U)
  D_C = g_C D + c_C S + (A_C U + G_C Z)^T K     S_C = b_C S + (B_C U)^T K
  o   = Q W^T + g Q D^T + c Q S^T + (A * Q K^T) U + (G * Q K^T) Z

A token that starts a document cuts every product that would reach across it.
A token that is not `live` (padding) changes nothing.

Where `mem` has a chunk of one token (`MemoryConfig.running`) its error is read
from what it is by then, `e_t = (W + D_{t-1}) p_t + r_t` with `p = k - v` or a
part of it, which is linear in D as well: the system of its rows alone has
`k + p` in the place of the left K, and `-eta (g_p (K + P) D^T + W P + r)` on
the right.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.decay import Chunk, Decay, decays
from nestax.models.memory.solve import BLOCK, dot, solve_unit_lower
from nestax.models.memory.types import (
  MemoryConfig,
  Weights,
  inner_gain,
  outer_gain,
  unit,
  wide,
)


class Written(NamedTuple):
  """One matrix after a chunk was written into it, and how to read it inside."""

  slow: jax.Array
  fast: jax.Array  # at the chunk's start
  momentum: jax.Array | None
  key: jax.Array
  U: jax.Array | None
  Z: jax.Array  # U + Z without momentum


def write(
  cfg, slow, fast, momentum, key_CxK, eta_C, U, decay, dtype, point_CxK=None
):
  """Writes a chunk into one matrix `[rows, K]`.

  Args:
    point_CxK: what the step of a token takes off the matrix as it is by then,
      `eta (D point) k^T`; the key (of `delta`), or nothing, unless given.

  Returns:
    (fast part, momentum, Written), the first two after the chunk.
  """
  if point_CxK is None and cfg.delta:
    point_CxK = key_CxK
  eta_Cx1 = eta_C[:, None]
  if point_CxK is not None:
    kk = dot(point_CxK, key_CxK.T, dtype)
    L = eta_Cx1 * decay.G_p_CxC * kk
    rhs = decay.g_p_C[:, None] * dot(point_CxK, fast.T, dtype)
    if cfg.anchor == 'zero':
      rhs = rhs + decay.anchor_p_C[:, None] * dot(point_CxK, slow.T, dtype)
    if cfg.momentum:
      rhs = rhs + decay.c_p_C[:, None] * dot(key_CxK, momentum.T, dtype)
      rhs = -eta_Cx1 * (rhs + dot(decay.A_p_CxC * kk, U, dtype))
    else:
      rhs = U - eta_Cx1 * rhs
    Z = solve_unit_lower(L, rhs, dtype, 2 if cfg.running else BLOCK)
  else:
    Z = jnp.zeros_like(U) if cfg.momentum else U

  new = decay.g_C[-1] * fast
  if cfg.anchor == 'zero':
    new = new + (decay.anchor_C[-1] - 1.0) * slow
  gain = decay.G_CxC[-1][:, None] * Z
  if cfg.momentum:
    new = new + decay.c_C[-1] * momentum
    gain = gain + decay.A_CxC[-1][:, None] * U
    added = dot((decay.B_last_C[:, None] * U).T, key_CxK, dtype)
    new_momentum = decay.b_last * momentum + added
  else:
    new_momentum = None
  new = new + dot(gain.T, key_CxK, dtype)
  written = Written(
    slow, fast, momentum, key_CxK, U if cfg.momentum else None, Z
  )
  return new, new_momentum, written


def write_running(
  cfg, slow, fast, key_CxK, value_CxK, eta_C, e_CxR, decay, dtype
):
  """Writes the stack's rows, `mem` by what it is at each token.

  Args:
    slow, fast: of all rows.
    e_CxR: inner gradients, those of `mem` at its slow part alone.

  Returns:
    (fast part, Written of the rows of `mem`).
  """
  start, stop = cfg.rows(key_CxK.shape[-1])['mem']

  def others(x, axis=0):
    before, _, after = jnp.split(x, (start, stop), axis)
    return jnp.concatenate([before, after], axis)

  U = -eta_C[:, None] * e_CxR
  rest, _, _ = write(
    cfg, others(slow), others(fast), None, key_CxK, eta_C, others(U, 1),
    decay, dtype,
  )  # fmt: skip
  point = (cfg.objective == 'l2') * key_CxK - cfg.generated * value_CxK
  mine, U = slow[start:stop], U[:, start:stop]
  if cfg.anchor == 'zero':  # `write` reads the slow part, as it is by then
    U = U + eta_C[:, None] * dot(point, mine.T, dtype)
  mem, _, written = write(
    cfg, mine, fast[start:stop], None, key_CxK, eta_C, U, decay, dtype,
    cfg.delta * key_CxK + point,
  )  # fmt: skip
  before, after = jnp.split(rest, (start,))
  return jnp.concatenate([before, mem, after]), written


def _forgotten(cfg, boundary: Weights) -> Weights:
  """The boundary with nothing in `mem`."""
  start, stop = cfg.rows(boundary.stack.shape[-1])['mem']
  return boundary._replace(stack=boundary.stack.at[start:stop].set(0.0))


def read_running(cfg, written: Written, decay: Decay, query_CxK, dtype):
  """Reads each token's query from the matrix as it stood after that token."""
  qk = dot(query_CxK, written.key.T, dtype)
  out = dot(query_CxK, written.slow.T, dtype)
  if cfg.anchor == 'zero':
    out = out * decay.anchor_C[:, None]
  out = out + decay.g_C[:, None] * dot(query_CxK, written.fast.T, dtype)
  out = out + dot(decay.G_CxC * qk, written.Z, dtype)
  if cfg.momentum:
    out = out + decay.c_C[:, None] * dot(query_CxK, written.momentum.T, dtype)
    out = out + dot(decay.A_CxC * qk, written.U, dtype)
  return out


def _read(slow, fast, alive_C, x_CxK, dtype):
  """`(W + D) x` at the boundary; `W x` for a document that began inside."""
  if alive_C is None:
    return dot(x_CxK, (slow + fast).T, dtype)
  y = jnp.where(alive_C[:, None], dot(x_CxK, fast.T, dtype), 0.0)
  return dot(x_CxK, slow.T, dtype) + y


def _residual(cfg, box, z):
  return wide(z) if box in cfg.identity else 0.0


def _map(cfg, box, slow, fast, alive_C, x_CxK, dtype):
  """A memory without its residual, at the boundary."""
  start, stop = cfg.rows(x_CxK.shape[-1])[box]
  rows = _read(
    slow.stack[start:stop], fast.stack[start:stop], alive_C, x_CxK, dtype
  )
  if box not in cfg.deep:
    return rows
  h = jax.nn.gelu(rows)
  return _read(slow.outer[box], fast.outer[box], alive_C, h, dtype)


def project(cfg, initial, slow, boundary, alive_C, chunk: Chunk, dtype):
  """q, k, v `[C, K]`, eta and log alpha `[C]`, read at the boundary."""

  def box(name, x):
    if name not in cfg.boxes:
      return wide(x)
    y = _map(cfg, name, slow, boundary, alive_C, x, dtype)
    return y + _residual(cfg, name, x)

  def gate(name):
    row = initial[name]['kernel'][None, :]
    fast = jnp.zeros_like(row)
    if name in cfg.gates:
      start, stop = cfg.rows(row.shape[-1])[name]
      fast = boundary.stack[start:stop]
    # float32 whatever the matmuls' dtype: alpha's logarithm is summed
    logit = _read(row, fast, alive_C, chunk.key_CxK, row.dtype)
    return logit[:, 0] + initial[name]['bias']

  q, k, v = (box(n, x) for n, x in zip(('q', 'k', 'v'), chunk[:3]))
  q, k = (unit(q), unit(k)) if cfg.key_norm else (q, k)
  v = unit(v) if cfg.value_norm else v
  if 'eta' in cfg.given:
    eta = chunk.eta_C
  else:
    eta = cfg.eta_max * jax.nn.sigmoid(gate('eta'))
  if not cfg.retention:
    log_alpha = jnp.zeros_like(eta)
  elif 'alpha' in cfg.given:
    log_alpha = chunk.log_alpha_C
  else:
    log_alpha = jax.nn.log_sigmoid(gate('alpha'))
  if chunk.live_C is not None:
    eta = jnp.where(chunk.live_C, eta, 0.0)
    log_alpha = jnp.where(chunk.live_C, log_alpha, 0.0)
  return q, k, v, eta, log_alpha


def recall(cfg, slow, boundary, alive_C, query_CxK, dtype):
  """Reads queries from `mem` as it stood at the boundary, written or not."""
  q = unit(query_CxK) if cfg.key_norm else wide(query_CxK)
  out = _map(cfg, 'mem', slow, boundary, alive_C, q, dtype)
  return out + _residual(cfg, 'mem', q)


def errors(cfg, slow, boundary, alive_C, k, v, dtype):
  """Inner gradients at the boundary: of the stack's rows, of second layers.

  Returns:
    e_CxR, and per two-layer memory its second layer's (key_CxF, e_CxK).
  """
  l2 = cfg.objective == 'l2'

  def difference(at_k, at_v):
    return l2 * at_k - cfg.generated * at_v

  if cfg.deep:
    both = jnp.concatenate([k, v])
    alive = None if alive_C is None else jnp.concatenate([alive_C, alive_C])
    rows = _read(slow.stack, boundary.stack, alive, both, dtype)
    rows_k, rows_v = jnp.split(rows, 2)
    rows_e = difference(rows_k, rows_v)
  elif l2 or cfg.generated:
    # both reads are linear, and so one
    point = difference(k, v)
    rows_e = _read(slow.stack, boundary.stack, alive_C, point, dtype)
  else:
    rows_e = jnp.zeros((k.shape[0], slow.stack.shape[0]), k.dtype)

  parts, outer = [], {}
  for box in (*cfg.boxes, *cfg.gates):
    start, stop = cfg.rows(k.shape[-1])[box]
    if box in cfg.gates:
      parts.append(rows_e[:, start:stop])
      continue
    e = l2 * _residual(cfg, box, k) - v
    if box not in cfg.deep:
      parts.append(e + rows_e[:, start:stop])
      continue
    h, back = jax.vjp(jax.nn.gelu, rows_k[:, start:stop])
    h_v = jax.nn.gelu(rows_v[:, start:stop])
    point = difference(h, h_v)
    W, D = slow.outer[box], boundary.outer[box]
    e = e + _read(W, D, alive_C, point, dtype)
    (below,) = back(_read(W.T, D.T, alive_C, e, dtype))
    above = e
    if cfg.bounded:
      above, below = e / outer_gain(h), below / inner_gain(e, below)
    parts.append(below)
    outer[box] = (unit(h), above)
  return jnp.concatenate(parts, axis=-1), outer


def chunk_step(cfg: MemoryConfig, initial, slow, state, chunk: Chunk, dtype):
  """Advances one head of one sequence by a chunk that crosses no boundary.

  Args:
    cfg: the rule.
    initial: the head's slow parameters (the gates are read from it).
    slow: `types.stack_initial` of them.
    state: (boundary, running, momentum or None), unbatched Weights, float32.
    chunk: inputs, C tokens.
    dtype: of the matmuls' operands.

  Returns:
    ((boundary, running, momentum), output_CxK float32). The boundary changes
    only where a document began: it forgets; committing is the caller's.
  """
  boundary, running, momentum = state
  alive_C = None
  if chunk.reset_C is not None:
    alive_C = jnp.cumsum(chunk.reset_C.astype(jnp.int32)) == 0
  q, k, v, eta, log_alpha = project(
    cfg, initial, slow, boundary, alive_C, chunk, dtype
  )
  decay = decays(cfg, log_alpha, chunk)
  at = _forgotten(cfg, boundary) if cfg.running else boundary
  e, outer_e = errors(cfg, slow, at, alive_C, k, v, dtype)

  S = momentum or Weights(None, {})
  s_stack = None
  if cfg.running:
    stack, written = write_running(
      cfg, slow.stack, running.stack, k, v, eta, e, decay, dtype
    )
  else:
    stack, s_stack, written = write(
      cfg, slow.stack, running.stack, S.stack, k, eta, -eta[:, None] * e,
      decay, dtype,
    )  # fmt: skip
    written = _rows(written, *cfg.rows(k.shape[-1])['mem'])
  outer, s_outer, written_outer = {}, {}, {}
  for box, (key, e_outer) in outer_e.items():
    outer[box], s_outer[box], written_outer[box] = write(
      cfg, slow.outer[box], running.outer[box], S.outer.get(box), key, eta,
      -eta[:, None] * e_outer, decay, dtype,
    )  # fmt: skip

  if cfg.read == 'token':
    out = read_running(cfg, written, decay, q, dtype)
    if 'mem' in cfg.deep:
      h = jax.nn.gelu(out)
      out = read_running(cfg, written_outer['mem'], decay, h, dtype)
  else:
    out = _map(cfg, 'mem', slow, boundary, alive_C, q, dtype)
  out = out + _residual(cfg, 'mem', q)

  if alive_C is not None:
    boundary = jax.tree.map(lambda w: jnp.where(alive_C[-1], w, 0.0), boundary)
  momentum = Weights(s_stack, s_outer) if cfg.momentum else None
  return (boundary, Weights(stack, outer), momentum), out


def _rows(written: Written, start: int, stop: int) -> Written:
  """The part of the stack that one memory owns."""

  def pick(x):
    return None if x is None else x[start:stop]

  def columns(x):
    return None if x is None else x[:, start:stop]

  return Written(
    pick(written.slow),
    pick(written.fast),
    pick(written.momentum),
    written.key,
    columns(written.U),
    columns(written.Z),
  )
