"""Gradients of a chunk on a GPU's tiles; `d_x` is the gradient of x.

To be read after `chunk.chunk_step`, which is what is differentiated, and
`gpu_tile`, whose letters these are: of each memory W is the slow part and D the
fast one, which the chunks before have written, `[K, K]`; lw and ld are what its
tokens read the two by, `[C, K]`; T is the inverse of the chunk's system,
`[C, C]`; last_k are keys times what is left of each at the chunk's end; the
point is where an error is read, k or k - v, both `[C, K]`.

All are linear in what reaches the chunk, so that what comes by way of `mem`
and the output is found for all chunks at once (`gpu_parts`) and the walk back
(`gpu_turn`) adds what comes by way of the memories it carries. Those of a
token's scalars are of logarithms: every product of gates is the exponential
of a difference of sums at two tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import gpu_gates, gpu_tile


class Tokens(NamedTuple):
  """Of a chunk's keys and values, `[C, K]`, and their scalars, `[C]`."""

  k: jax.Array
  v: jax.Array
  total: jax.Array  # by the sums of log alpha up to each token
  enters: jax.Array  # of log (eta g_p), in `total` too
  eta: jax.Array  # of log eta, that of log (eta g_p) left out

  def __add__(self, other):
    return Tokens(*(a + b for a, b in zip(self, other)))


def none(shape) -> Tokens:
  tile = jnp.zeros((shape.C, shape.K), jnp.float32)
  row = jnp.zeros((shape.C,), jnp.float32)
  return Tokens(tile, tile, row, row, row)


def through_end(shape, decay, coupling, k, turned_k, d_last_k, d_kept, more):
  """Through the new fast parts and the system.

  Args:
    shape: of the walk.
    decay: of the chunk, `gpu_gates.Decays`.
    coupling: `[C, C]`, what stands before `k k^T` in the chunk's system; None:
      there is none.
    k: keys in the matmuls' dtype, `[C, K]`.
    turned_k: `T^T last_k`, `[C, K]`.
    d_last_k: of last_k, `[C, K]`.
    d_kept: sum of the fast parts times their gradients after the chunk, scalar.
    more: of the system by way of the output, its sign turned, `[C, C]`; None:
      nothing.
  """
  dots = shape.dots
  wide_k = k.astype(jnp.float32)
  d_k = decay.last[:, None] * d_last_k
  d_last = jnp.sum(d_k * wide_k, axis=1)
  end = jnp.sum(d_last) + decay.kept * d_kept
  total = gpu_gates.at_end(shape.C, end) - d_last
  enters = jnp.zeros_like(d_last)
  if coupling is not None:
    d_L = dots.nt(turned_k, d_last_k)
    d_L = d_L if more is None else d_L + more
    d_kk = (-coupling.astype(jnp.float32) * d_L).astype(shape.dtype)
    of_rows, of_columns = dots.nn(d_kk, k), dots.tn(d_kk, k)
    # sums over rows and columns of d_kk * (k k^T)
    enters = jnp.sum(of_rows * wide_k, axis=1)
    total = total + enters - jnp.sum(of_columns * wide_k, axis=1)
    d_k = d_k + of_rows + of_columns
  zero = jnp.zeros_like(enters)
  return Tokens(d_k, jnp.zeros_like(d_k), total, enters, zero)


def through_system(shape, decay, k, d_ld) -> Tokens:
  """Through what the system takes of the fast parts, `-eta_g k` of ld.

  Args:
    d_ld: `[C, K]`, summed over the memories.
  """
  zero = jnp.zeros_like(decay.eta)
  d_k = enters = None
  if shape.cfg.delta:
    d_k = -decay.eta_g[:, None] * d_ld
    enters = jnp.sum(d_k * k, axis=1)
  else:
    d_k, enters = jnp.zeros_like(d_ld), zero
  return Tokens(d_k, jnp.zeros_like(d_ld), enters, enters, zero)


def through_errors(shape, decay, k, v, d_sides, d_targets) -> Tokens:
  """Through the errors, `-eta` times the point and the targets.

  Args:
    shape: of the walk.
    decay: of the chunk.
    k: keys, float32 `[C, K]`.
    v: values, float32 `[C, K]`.
    d_sides: of lw, and of ld for the tokens that read the fast parts; None:
      there is no point.
    d_targets: pairs of a memory and the gradient of its `rhs^T`.
  """
  cfg, eta = shape.cfg, decay.eta[:, None]
  if d_sides is None:
    d_eta, d_k, d_v = jnp.zeros_like(decay.eta), 0.0, 0.0
  else:
    d_at = -eta * d_sides
    d_eta = jnp.sum(d_at * gpu_tile.point(cfg, k, v), axis=1)
    d_k = d_at if cfg.objective == 'l2' else jnp.zeros_like(d_at)
    d_v = -d_at if cfg.generated else jnp.zeros_like(d_at)
  for box, d_rhs in d_targets:
    d_target = eta * d_rhs
    d_v = d_v + d_target
    d_eta = d_eta + jnp.sum(d_target * v, axis=1)
    if gpu_tile.takes_key(cfg, box):
      d_k = d_k - d_target
      d_eta = d_eta - jnp.sum(d_target * k, axis=1)
  zero = jnp.zeros_like(d_eta)
  return Tokens(d_k, d_v, zero, zero, d_eta)


def alive_only(decay, x):
  """Rows of the tokens that read the fast parts."""
  return x if decay.alive is None else decay.alive[:, None] * x


def logits_back(gate, tokens: Tokens):
  """Gradients of eta's and alpha's logits.

  `total` and `before` are sums of log alpha; `before` leaves out its own.
  """
  total, enters = tokens.total, tokens.enters
  d_alpha = jnp.sum(total) - jnp.cumsum(total) + total - enters
  return (
    gate.slope_eta * (tokens.eta + enters),
    gate.slope_alpha * d_alpha,
  )
