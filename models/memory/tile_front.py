"""What a chunk's tokens say before anything is written, on tiles.

The mathematics is that of `chunk.chunk_step`, laid out for a matrix unit with
registers of 8 x 128: maps are transposed and side by side (`[K, M]`, M the
rows of all maps), so that all that belongs to tokens has them on rows. The
gates' memories are few rows; they keep their K on lanes and have tokens on
lanes too. Per-token scalars are wanted both as columns and as rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.tile_ops import (
  as_columns,
  columns_of,
  exact,
  iota,
  nn,
  ones_triangle,
  stack_rows,
  unit_norm,
)
from nestax.models.memory.types import MemoryConfig, wide

NEVER = -1e30  # the logarithm of zero, without its infinities


class Maps(NamedTuple):
  """Slow values, fast parts or gradients of one head's memories, float32."""

  maps_KxM: jax.Array
  gates_8xK: jax.Array  # rows eta, alpha, then zeros


class State(NamedTuple):
  """Fast parts of one head's memories, or their gradients."""

  boundary: Maps | None  # at the boundary; None: the running ones
  running: Maps
  momentum: Maps | None


class Tokens(NamedTuple):
  """One head's chunk; `marks` holds rows (documents begun so far, live)."""

  query_CxK: jax.Array
  key_CxK: jax.Array
  value_CxK: jax.Array
  marks_2xC: jax.Array | None


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


def read(x_CxK, slow, fast, alive_Cx1, dtype):
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


def _gate_rows(cfg, slow: Maps, bias_8x1, boundary, tokens: Tokens):
  """The gates' logits `[8, C]`, and all that follows from them as rows."""
  C = tokens.key_CxK.shape[0]
  alive = live_1xC = None
  if tokens.marks_2xC is not None:
    alive = (tokens.marks_2xC[0:1] == 0).astype(bias_8x1.dtype)
    live_1xC = tokens.marks_2xC[1:2] != 0
  lanes = ((1,), (1,))
  if alive is None:
    gates = slow.gates_8xK + boundary.gates_8xK
    logit = exact(gates, tokens.key_CxK, lanes)
  else:
    logit = exact(slow.gates_8xK, tokens.key_CxK, lanes)
    logit = logit + alive * exact(boundary.gates_8xK, tokens.key_CxK, lanes)
  logit = logit + bias_8x1
  log_eta, log_alpha = _log_gates(cfg, logit, live_1xC)

  triangle = ones_triangle(C, logit.dtype)
  total = exact(stack_rows([log_alpha], logit.dtype), triangle)[0:1]
  before = total - log_alpha
  reach = 1.0 if alive is None else alive
  rows = {
    'total': total,
    'row': log_eta + before,
    'eta': jnp.exp(log_eta),
    'g': jnp.exp(total) * reach,
    'g_p': jnp.exp(before) * reach,
    'eta_g': jnp.exp(log_eta + before) * reach,
    'last': jnp.exp(total[:, C - 1 :] - total),
  }
  if tokens.marks_2xC is not None:
    document = tokens.marks_2xC[0:1]
    same = (document == document[:, C - 1 :]).astype(logit.dtype)
    rows['last'] = rows['last'] * same
    rows |= {'document': document, 'alive': alive}
  return logit, rows


def _decay(rows, columns, name: str):
  """`exp(column - total)` where a token reaches another, `[C, C]`.

  The column `total` gives G, lower triangular; `row` gives eta_t G_p[t, i],
  strictly so.
  """
  C = rows['total'].shape[1]
  t, i = iota((C, C), 0), iota((C, C), 1)
  mask = t >= i if name == 'total' else t > i
  if 'document' in rows:
    mask = mask & (columns['document'] == rows['document'])
  # masked before the exponential: above the diagonal it would overflow
  return jnp.exp(jnp.where(mask, columns[name] - rows['total'], NEVER))


def front_steps(cfg: MemoryConfig, slow, bias_8x1, boundary, tokens, dtype):
  """Everything a chunk's tokens say by themselves and read at the boundary.

  A generator, see `steps`; it returns a Front.
  """
  K = tokens.key_CxK.shape[1]
  logit, rows = _gate_rows(cfg, slow, bias_8x1, boundary, tokens)
  yield
  columns = as_columns(rows)
  alive_Cx1 = columns.get('alive')

  def box(name, x):
    if name not in cfg.boxes:
      return wide(x)
    at = columns_of(cfg, name, K)
    y = read(
      x, slow.maps_KxM[:, at], boundary.maps_KxM[:, at], alive_Cx1, dtype
    )
    return y + wide(x) if name in cfg.identity else y

  q, q_norm = unit_norm(box('q', tokens.query_CxK))
  yield
  k, k_norm = unit_norm(box('k', tokens.key_CxK))
  yield
  v, v_norm = box('v', tokens.value_CxK), None
  if cfg.value_norm:
    v, v_norm = unit_norm(v)
  yield
  G = _decay(rows, columns, 'total')
  yield
  E = _decay(rows, columns, 'row')
  return Front(
    q, k, v, (q_norm, k_norm, v_norm), logit, G, E, alive_Cx1, rows, columns
  )
