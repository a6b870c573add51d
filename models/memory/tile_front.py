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

from nestax.models.memory.decay import log_rate
from nestax.models.memory.steps import beside, one_by_one
from nestax.models.memory.tile_ops import (
  as_columns,
  columns_of,
  exact,
  nn,
  ones_triangle,
  stack_rows,
  unit_norm,
)
from nestax.models.memory.tile_push import (
  NEVER,
  Push,
  decay,
  push_rows,
  push_steps,
)
from nestax.models.memory.types import GATES, MemoryConfig, wide


class Maps(NamedTuple):
  """Slow values, fast parts or gradients of one head's memories, float32."""

  maps_KxM: jax.Array
  gates_8xK: jax.Array  # rows eta, alpha, then zeros
  outer: dict[str, jax.Array] | None = None  # second layers, [F, K]


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
  handed_RxC: jax.Array | None = None  # gates as rows, see `handed`


class Front(NamedTuple):
  """What is known of a chunk before anything is written."""

  q_CxK: jax.Array
  k_CxK: jax.Array
  v_CxK: jax.Array
  norms: tuple  # reciprocal norms of q, k, v, [C, 1]; None where not taken
  logit_8xC: jax.Array
  G_CxC: jax.Array | None  # None where it is found later, by `reach`
  E_CxC: jax.Array  # eta_t G_p[t, i]
  alive_Cx1: jax.Array | None
  rows: dict  # name -> [1, C]
  columns: dict  # name -> [C, 1]
  push: Push | None  # with momentum


def handed(cfg: MemoryConfig) -> tuple[str, ...]:
  """Gates that are handed in: log beta, and eta or log alpha if `given`."""
  given = tuple(gate for gate in GATES if gate in cfg.given)
  return ('beta', *given) if cfg.momentum else given


def handed_rows(cfg: MemoryConfig, tokens: Tokens) -> dict[str, jax.Array]:
  """Those, by name, `[1, C]`."""
  return {
    gate: tokens.handed_RxC[i : i + 1] for i, gate in enumerate(handed(cfg))
  }


def own_triangle(rows, dtype):
  """`ones_triangle`, 1 only where both tokens are of one document."""
  document = as_columns({'document': rows['document']})['document']
  own = document == rows['document']
  triangle = ones_triangle(own.shape[0], dtype)
  return jnp.where(own, triangle, jnp.zeros_like(triangle))


def read(x_CxK, slow, fast, alive_Cx1, dtype):
  """`(W + D) x`, the fast part only for tokens whose document it has read."""
  if alive_Cx1 is None:
    return nn(x_CxK, slow + fast, dtype)
  return nn(x_CxK, slow, dtype) + alive_Cx1 * nn(x_CxK, fast, dtype)


def _log_gates(cfg, logit_8xC, given, live_1xC):
  """Rows log eta and log alpha of the chunk's tokens."""
  log = jax.nn.log_sigmoid(logit_8xC)
  log_eta = log[0:1] + jnp.log(jnp.asarray(cfg.eta_max, log.dtype))
  if 'eta' in given:
    log_eta = log_rate(given['eta'])
  log_alpha = log[1:2] if cfg.retention else jnp.zeros_like(log_eta)
  log_alpha = given.get('alpha', log_alpha)
  if live_1xC is not None:
    log_eta = jnp.where(live_1xC, log_eta, NEVER)
    log_alpha = jnp.where(live_1xC, log_alpha, 0.0)
  return log_eta, log_alpha


def _alive(tokens: Tokens, dtype):
  """1 for tokens of the document that the chunk began in, `[1, C]`."""
  return (tokens.marks_2xC[0:1] == 0).astype(dtype)


def _gate_rows(cfg, slow: Maps, bias_8x1, boundary, tokens: Tokens):
  """The gates' logits `[8, C]`, and all that follows from them as rows.

  A generator of steps.
  """
  C = tokens.key_CxK.shape[0]
  alive = live_1xC = None
  if tokens.marks_2xC is not None:
    alive = _alive(tokens, bias_8x1.dtype)
    live_1xC = tokens.marks_2xC[1:2] != 0
  lanes = ((1,), (1,))
  if alive is None:
    gates = slow.gates_8xK + boundary.gates_8xK
    logit = exact(gates, tokens.key_CxK, lanes)
  else:
    logit = exact(slow.gates_8xK, tokens.key_CxK, lanes)
    logit = logit + alive * exact(boundary.gates_8xK, tokens.key_CxK, lanes)
  logit = logit + bias_8x1
  yield
  given = handed_rows(cfg, tokens)
  log_eta, log_alpha = _log_gates(cfg, logit, given, live_1xC)

  triangle = ones_triangle(C, logit.dtype)
  logs = [log_alpha]
  if cfg.momentum:
    logs.append(given['beta'])
  totals = exact(stack_rows(logs, logit.dtype), triangle)
  yield
  total = totals[0:1]
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
  same = None
  if tokens.marks_2xC is not None:
    document = tokens.marks_2xC[0:1]
    same = (document == document[:, C - 1 :]).astype(logit.dtype)
    rows['last'] = rows['last'] * same
    rows |= {'document': document, 'alive': alive}
  if cfg.anchor == 'zero':
    log_left = total
    if 'document' in rows:
      log_left = exact(
        stack_rows([log_alpha], logit.dtype), own_triangle(rows, logit.dtype)
      )[0:1]
    rows['anchor'] = jnp.exp(log_left)
    rows['anchor_p'] = jnp.exp(log_left - log_alpha)
  if cfg.momentum:
    live = None if live_1xC is None else live_1xC.astype(logit.dtype)
    rows |= push_rows(totals[1:2], log_alpha, before, alive, live, same)
  return logit, rows


def front_steps(
  cfg: MemoryConfig, slow, bias_8x1, boundary, tokens, dtype, maps=None,
  ahead=False,
):  # fmt: skip
  """Everything a chunk's tokens say by themselves and read at the boundary.

  A generator, see `steps`; it returns a Front.

  Args:
    maps: `(box, x, alive) -> y`, how maps are read where it is not from their
      columns of `slow` and `boundary`; those then have gates only.
    ahead: vectors are found while gates wait for their results, which keeps
      more values at a time, and G is left for later.
  """
  K = tokens.key_CxK.shape[1]
  alive_Cx1 = None
  if tokens.marks_2xC is not None:
    alive_Cx1 = as_columns({'alive': _alive(tokens, bias_8x1.dtype)})['alive']

  def box(name, x):
    if name not in cfg.boxes:
      return wide(x)
    if maps is not None:
      y = maps(name, x, alive_Cx1)
    else:
      at = columns_of(cfg, name, K)
      y = read(
        x, slow.maps_KxM[:, at], boundary.maps_KxM[:, at], alive_Cx1, dtype
      )
    return y + wide(x) if name in cfg.identity else y

  def vectors():
    found = {}
    for name, x, normed in (
      ('k', tokens.key_CxK, cfg.key_norm),
      ('v', tokens.value_CxK, cfg.value_norm),
      ('q', tokens.query_CxK, cfg.key_norm),
    ):
      y = box(name, x)
      found[name] = unit_norm(y) if normed else (y, None)
      yield
    return zip(*(found[name] for name in 'qkv'))

  # those of momentum are many to keep while vectors are found
  early = ahead or not cfg.momentum

  def decays(rows, columns):
    G = push = None
    if not ahead:
      G = reach(rows, columns)
      yield
    if cfg.momentum:
      G_p = decay(rows, columns, 'before', 'total', strict=True)
      E = columns['eta'] * G_p
      push = yield from push_steps(rows, columns, G_p, dtype)
    else:
      E = decay(rows, columns, 'row', 'total', strict=True)
    return G, E, push

  def gates():
    logit, rows = yield from _gate_rows(cfg, slow, bias_8x1, boundary, tokens)
    yield
    columns = as_columns(rows)
    yield
    found = (yield from decays(rows, columns)) if early else None
    return logit, rows, columns, found

  both = beside if ahead else one_by_one
  (logit, rows, columns, found), (vectors, norms) = yield from both(
    gates(), vectors()
  )
  G, E, push = found or (yield from decays(rows, columns))
  return Front(*vectors, norms, logit, G, E, alive_Cx1, rows, columns, push)


def reach(rows, columns):
  """G: what is left of a step at its token and after it, `[C, C]`."""
  return decay(rows, columns, 'total', 'total', strict=False)
