"""The gates of a chunk on a GPU's tiles, and the decays they multiply to.

In log space; `[C]` are the chunk's tokens, and what has a row for each token
and a column for each earlier one is `[C, C]`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.gpu_triton import triton
from nestax.models.memory.types import MemoryConfig

NEVER = -1e30  # the logarithm of zero, without its infinities
PER_E = math.log2(math.e)


class Marks(NamedTuple):
  """Per token `[C]`; None where all are of one document, or live."""

  document: jax.Array | None  # how many began in this chunk so far
  live: jax.Array | None


class Gates(NamedTuple):
  """A chunk's gates and their products from the boundary, `[C]` float32."""

  log_eta: jax.Array
  total: jax.Array  # log g
  before: jax.Array  # log g_p
  slope_eta: jax.Array  # of log eta by its logit; handed in: by itself
  slope_alpha: jax.Array


class Decays(NamedTuple):
  """Products of a chunk's gates; `[C]` and one scalar."""

  eta: jax.Array
  g: jax.Array
  eta_g: jax.Array
  last: jax.Array  # from each token to the chunk's end
  alive: jax.Array | None  # 1 where the boundary's document lasts
  kept: jax.Array  # of the fast parts, at the chunk's end


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def end_of(x_C):
  """The last entry of `[C]`, as a scalar."""
  C = x_C.shape[0]
  return jnp.sum(jnp.where(iota((C,), 0) == C - 1, x_C, 0))


def at_end(C: int, scalar):
  """`[C]`, the scalar at its last entry and 0 before."""
  return jnp.where(iota((C,), 0) == C - 1, scalar, 0.0)


def log_sigmoid(x):
  return jnp.minimum(x, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(x)))


def gates(cfg: MemoryConfig, logits, handed, marks: Marks) -> Gates:
  """The gates of a chunk.

  Args:
    cfg: the rule.
    logits: of eta and of alpha, `[C]` float32, read at the chunk's boundary.
    handed: the logarithms of those that are handed in, which have no logits.
    marks: of the tokens.
  """
  most = jnp.log(jnp.float32(cfg.eta_max))
  log_eta, eta_slope = _log(logits[0], most, handed[0])
  if cfg.retention:
    log_alpha, alpha_slope = _log(logits[1], 0.0, handed[1])
  else:
    log_alpha = alpha_slope = jnp.zeros_like(log_eta)
  slopes = [eta_slope, alpha_slope]
  if marks.live is not None:
    live = marks.live != 0
    log_eta = jnp.where(live, log_eta, NEVER)
    log_alpha = jnp.where(live, log_alpha, 0.0)
    slopes = [jnp.where(live, slope, 0.0) for slope in slopes]
  total = jnp.cumsum(log_alpha)
  return Gates(log_eta, total, total - log_alpha, *slopes)


def _log(logit, most, handed):
  """(A gate's logarithm, its slope by the logit or by itself)."""
  if handed is not None:
    return handed, jnp.ones_like(handed)
  return log_sigmoid(logit) + most, 1.0 / (1.0 + jnp.exp(logit))


def decays(gate: Gates, marks: Marks, end=None) -> Decays:
  """Of a chunk, at whose end `total` is `end` where that is known."""
  end = end_of(gate.total) if end is None else end
  eta, g = jnp.exp(gate.log_eta), jnp.exp(gate.total)
  eta_g = jnp.exp(gate.log_eta + gate.before)
  last, kept = jnp.exp(end - gate.total), jnp.exp(end)
  if marks.document is None:
    return Decays(eta, g, eta_g, last, None, kept)
  alive = (marks.document == 0).astype(jnp.float32)
  latest = jnp.max(marks.document)
  last = jnp.where(marks.document == latest, last, 0.0)
  kept = jnp.where(latest == 0, kept, 0.0)
  return Decays(eta, g * alive, eta_g * alive, last, alive, kept)


def _exp2(dots, x):
  """Of the machine: what would be below its normal numbers is 0."""
  if dots.interpret:
    return jnp.exp2(x)
  like = jax.ShapeDtypeStruct(x.shape, x.dtype)
  (y,) = triton.elementwise_inline_asm(
    'ex2.approx.ftz.f32 $0, $1;', args=[x], constraints='=f,f', pack=1,
    result_shape_dtypes=[like],
  )  # fmt: skip
  return y


def inside(dots, rows, columns, marks: Marks, strict: bool):
  """`exp(rows[t] - columns[i])` for i up to t, of the same document."""
  C = rows.shape[0]
  row, column = iota((C, C), 0), iota((C, C), 1)
  mask = row > column if strict else row >= column
  if marks.document is not None:
    mask = mask & (marks.document[:, None] == marks.document[None, :])
  # of base two, which the machine has; masked before: above the diagonal it
  # would overflow
  rows, columns = PER_E * rows[:, None], PER_E * columns[None, :]
  return _exp2(dots, jnp.where(mask, rows - columns, NEVER))


def within(dots, gate: Gates, marks: Marks):
  """`G[t, i]`, the decay from token i to the running memory after t."""
  return inside(dots, gate.total, gate.total, marks, strict=False)


def coupling(dots, gate: Gates, marks: Marks):
  """`eta_t G_p[t, i]`, by which earlier keys enter the system."""
  return inside(
    dots, gate.log_eta + gate.before, gate.total, marks, strict=True
  )
