"""A chunk of matrix memories on two-dimensional tiles, forward and backward.

The mathematics is that of `chunk.chunk_step`, laid out for a matrix unit with
registers of 8 x 128: maps are transposed and side by side (`[K, M]`, M the
rows of all maps), so that all that belongs to tokens has them on rows. The
gates' memories are few rows; they keep their K on lanes and have tokens on
lanes too. Per-token scalars are wanted both as columns and as rows.

The backward pass is by hand and takes what only the forward pass can know
cheaply: the inverse T of the triangular system and its solution Z. No
momentum here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.inverse import dense_inverse
from nestax.models.memory.types import MemoryConfig, wide

ROWS = 8  # of a tile of per-token scalars: one register's sublanes
NEVER = -1e30  # the logarithm of zero, without its infinities


class Maps(NamedTuple):
  """Slow values, fast parts or gradients of one head's memories, float32."""

  maps_KxM: jax.Array
  gates_8xK: jax.Array  # rows eta, alpha, then zeros


class Tokens(NamedTuple):
  """One head's chunk; `marks` holds rows (documents begun so far, live)."""

  query_CxK: jax.Array
  key_CxK: jax.Array
  value_CxK: jax.Array
  marks_2xC: jax.Array | None


class Saved(NamedTuple):
  """What the backward pass takes from the forward pass."""

  running: Maps  # at the chunk's start; maps in the matmuls' dtype
  boundary: Maps | None  # None: the running ones
  T_CxC: jax.Array
  Z_CxM: jax.Array
  Zg_8xC: jax.Array


class Front(NamedTuple):
  """What is known of a chunk before anything is written."""

  q_CxK: jax.Array
  k_CxK: jax.Array
  v_CxK: jax.Array
  norms: tuple  # reciprocal norms of q, k, v, [C, 1]; None where not taken
  logit_8xC: jax.Array
  G_CxC: jax.Array
  E_CxC: jax.Array  # eta_t G_p[t, i]
  alive_Cx1: jax.Array | None
  rows: dict  # name -> [1, C]
  columns: dict  # name -> [C, 1]


def _product(a, b, dims, dtype):
  precision = 'highest' if dtype == jnp.float32 else None
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (dims, ((), ())),
    precision=precision,
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )


def nn(a, b, dtype):
  """`a b`."""
  return _product(a, b, ((1,), (0,)), dtype)


def nt(a, b, dtype):
  """`a b^T`."""
  return _product(a, b, ((1,), (1,)), dtype)


def tn(a, b, dtype):
  """`a^T b`."""
  return _product(a, b, ((0,), (0,)), dtype)


def exact(rows_8xN, b, dims=((1,), (0,))):
  """Few float32 rows times a bfloat16 matrix, exact to float32."""
  if b.dtype != jnp.bfloat16:
    return _product(rows_8xN, b, dims, rows_8xN.dtype)
  parts, rest = [], rows_8xN
  for _ in range(3):
    part = rest.astype(jnp.bfloat16).astype(jnp.float32)
    parts.append(part)
    rest = rest - part
  out = _product(jnp.concatenate(parts), b, dims, jnp.bfloat16)
  return out[:ROWS] + out[ROWS : 2 * ROWS] + out[2 * ROWS : 3 * ROWS]


def _iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _stack(rows, dtype):
  """Rows `[1, C]` as one tile `[8, C]`."""
  C = rows[0].shape[1]
  at = _iota((ROWS, C), 0)
  tile = jnp.zeros((ROWS, C), dtype)
  for i, row in enumerate(rows):
    tile = jnp.where(at == i, jnp.broadcast_to(row, (ROWS, C)), tile)
  return tile


def _as_columns(rows: dict):
  """Rows `[1, C]` as columns `[C, 1]`: one transposition for eight of them."""
  names = list(rows)
  columns = {}
  for first in range(0, len(names), ROWS):
    some = names[first : first + ROWS]
    tile = _stack([rows[name] for name in some], rows[some[0]].dtype).T
    columns |= {name: tile[:, i : i + 1] for i, name in enumerate(some)}
  return columns


def _ones_triangle(C: int, dtype):
  """`[C, C]`, 1 where the row is at most the column."""
  upto = _iota((C, C), 0) <= _iota((C, C), 1)
  # float32 sums are exact with it, see `exact`
  narrow = jnp.bfloat16 if dtype == jnp.float32 else dtype
  return upto.astype(dtype).astype(narrow)


def _unit(x):
  norm = jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
  return x * norm, norm


def _columns_of(cfg, box, K):
  start, stop = cfg.rows(K)[box]
  return slice(start, stop)


def _read(x_CxK, slow, fast, alive_Cx1, dtype):
  """`(W + D) x`, the fast part only for tokens whose document it has read."""
  if alive_Cx1 is None:
    return nn(x_CxK, slow + fast, dtype)
  return nn(x_CxK, slow, dtype) + alive_Cx1 * nn(x_CxK, fast, dtype)


def _log_gates(cfg, logit_8xC, live_1xC):
  """Rows log eta and log alpha of the chunk's tokens."""
  log = jax.nn.log_sigmoid(logit_8xC)
  log_eta = log[0:1] + jnp.log(jnp.asarray(cfg.eta_max, log.dtype))
  log_alpha = log[1:2] if cfg.retention else jnp.zeros_like(log_eta)
  if live_1xC is not None:
    log_eta = jnp.where(live_1xC, log_eta, NEVER)
    log_alpha = jnp.where(live_1xC, log_alpha, 0.0)
  return log_eta, log_alpha


def front(cfg: MemoryConfig, slow: Maps, bias_8x1, boundary, tokens, dtype):
  """Everything a chunk's tokens say by themselves and read at the boundary."""
  C, K = tokens.key_CxK.shape
  alive_1xC = live_1xC = None
  if tokens.marks_2xC is not None:
    alive_1xC = (tokens.marks_2xC[0:1] == 0).astype(bias_8x1.dtype)
    live_1xC = tokens.marks_2xC[1:2] != 0
  lanes = ((1,), (1,))
  if alive_1xC is None:
    gates = slow.gates_8xK + boundary.gates_8xK
    logit = exact(gates, tokens.key_CxK, lanes)
  else:
    logit = exact(slow.gates_8xK, tokens.key_CxK, lanes)
    fast = exact(boundary.gates_8xK, tokens.key_CxK, lanes)
    logit = logit + alive_1xC * fast
  logit = logit + bias_8x1
  log_eta, log_alpha = _log_gates(cfg, logit, live_1xC)

  triangle = _ones_triangle(C, logit.dtype)
  total = exact(_stack([log_alpha], logit.dtype), triangle)[0:1]
  before = total - log_alpha
  alive = 1.0 if alive_1xC is None else alive_1xC
  eta = jnp.exp(log_eta)
  rows = {
    'total': total,
    'row': log_eta + before,
    'eta': eta,
    'g': jnp.exp(total) * alive,
    'eta_g': jnp.exp(log_eta + before) * alive,
    'last': jnp.exp(total[:, C - 1 :] - total),
  }
  if tokens.marks_2xC is not None:
    rows['document'] = tokens.marks_2xC[0:1]
    document = tokens.marks_2xC[0:1]
    same = (document == document[:, C - 1 :]).astype(logit.dtype)
    rows['last'] = rows['last'] * same
    rows['alive'] = alive_1xC
  columns = _as_columns(rows)
  alive_Cx1 = columns.get('alive')

  def box(name, x):
    if name not in cfg.boxes:
      return wide(x)
    at = _columns_of(cfg, name, K)
    y = _read(
      x, slow.maps_KxM[:, at], boundary.maps_KxM[:, at], alive_Cx1, dtype
    )
    return y + wide(x) if name in cfg.identity else y

  q, q_norm = _unit(box('q', tokens.query_CxK))
  k, k_norm = _unit(box('k', tokens.key_CxK))
  v, v_norm = box('v', tokens.value_CxK), None
  if cfg.value_norm:
    v, v_norm = _unit(v)

  mask = _iota((C, C), 0) >= _iota((C, C), 1)
  strict = _iota((C, C), 0) > _iota((C, C), 1)
  if tokens.marks_2xC is not None:
    same = columns['document'] == rows['document']
    mask, strict = mask & same, strict & same
  # masked before the exponential: above the diagonal it would overflow
  G = jnp.exp(jnp.where(mask, columns['total'] - rows['total'], NEVER))
  E = jnp.exp(jnp.where(strict, columns['row'] - rows['total'], NEVER))
  return Front(
    q, k, v, (q_norm, k_norm, v_norm), logit, G, E, alive_Cx1, rows, columns
  )


def _adaptive(cfg, tile):
  """The tile with the rows of gates that are no memories set to zero."""
  if len(cfg.gates) == 2:
    return jnp.where(_iota(tile.shape, 0) < 2, tile, 0.0)
  if not cfg.gates:
    return jnp.zeros_like(tile)
  row = 0 if cfg.gates[0] == 'eta' else 1
  return jnp.where(_iota(tile.shape, 0) == row, tile, 0.0)


def _point(cfg, k, v):
  """Where the stack is read for the inner gradients: the reads are linear."""
  point = k if cfg.objective == 'l2' else jnp.zeros_like(k)
  return point - v if cfg.generated else point


def _targets(cfg, k, v):
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
  return _adaptive(cfg, e)


def _gate_terms(cfg, slow, boundary, running, point, k, rows, dtype):
  """Both terms of the gates' right-hand side, `[8, C]`."""
  e = -rows['eta'] * _gate_errors(cfg, slow, boundary, point, rows, dtype)
  if not cfg.delta:
    return e, jnp.zeros_like(e)
  kept = _adaptive(cfg, nt(running.gates_8xK, k, dtype))
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
  point = _point(cfg, f.k_CxK, f.v_CxK).astype(dtype)
  mem = _columns_of(cfg, 'mem', K)

  rhs = _targets(cfg, f.k_CxK, f.v_CxK)
  rhs = rhs + _read(
    point, slow.maps_KxM, at_boundary.maps_KxM, f.alive_Cx1, dtype
  )
  rhs = -columns['eta'] * rhs
  first, second = _gate_terms(
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
    out = _read(
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
