"""Gradients of a chunk with momentum on a GPU's tiles; `d_x` is that of x.

See `gpu_adjoint`. Two sums of logarithms are told apart, `total` of the forget
gate and `total_b` of the momentum's. `A_p[t, i] = sum_s G_p[t, s] B[s, i]`
holds, besides those of t and i, a term `total_b - total` at each s between,
whose share is the diagonal of `G_p^T d_A_p B^T`. The weights of the momentum
at the boundary are those of the first token times its gate, `b_0`: gradients
of c_p go to the first column of A_p, where those of its gate cancel.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from nestax.models.memory import gpu_gates, gpu_momentum
from nestax.models.memory.gpu_adjoint import Tokens


class Reached(NamedTuple):
  """Of what a chunk is made of; letters of `gpu_momentum`.

  Tiles are functions that make them, `[C, K]`, called where they are used up:
  all of them at once do not fit the registers.
  """

  last_Ak: Callable
  kb: Callable
  ld: Callable | None  # with these four a system
  ls: Callable | None
  last_k: Callable | None
  turned: Callable | None  # (last_k, last_Ak) -> (of L, its sign turned; of P)
  kept: float  # scalars: of what is kept of fast parts and momenta
  c: float
  b: float


def _rows(x, y):
  return jnp.sum(x * y, axis=1)


def first(x_C):
  """The first entry of `[C]`, as a scalar."""
  return jnp.sum(jnp.where(gpu_gates.iota(x_C.shape, 0) == 0, x_C, 0.0))


def first_column(x_C):
  """The tile `[C, C]` that begins with this column, else zero."""
  C = x_C.shape[0]
  return jnp.where(gpu_gates.iota((C, C), 1) == 0, x_C[:, None], 0.0)


def at_end(C: int, scalar):
  return jnp.where(gpu_gates.iota((C,), 0) == C - 1, scalar, 0.0)


def through_chunk(shape, chunk, A_p, d: Reached):
  """(Tokens, gradient of total_b) by all that stands in `d`."""
  decay, push, C = chunk.decay, chunk.push, shape.C
  k = chunk.k.astype(jnp.float32)
  last = gpu_momentum.last_live(decay, chunk.marks)
  b_0 = first(push.b)
  d_kb = push.last_b[:, None] * d.kb()
  d_last_b = _rows(d_kb, k)
  d_last_Ak = d.last_Ak()
  d_A = _rows(d_last_Ak, k)
  d_k = d_kb + push.last_A[:, None] * d_last_Ak
  d_last_A = d_A * push.last_A
  total_b = at_end(C, jnp.sum(d_last_b) + push.b_end * d.b)
  total_b = total_b - d_last_A - d_last_b
  end = jnp.sum(d_last_A) + decay.kept * d.kept + push.c_end * d.c
  place = gpu_gates.iota((C,), 0)
  d_A = d_A + jnp.where(place == 0, b_0 * d.c, 0.0)
  between = last[:, None] * d_A[None, :]
  enters = total = jnp.zeros_like(decay.eta)
  if shape.cfg.delta:
    d_last_k = d.last_k()
    d_last = decay.last * _rows(d_last_k, k)
    d_k = d_k + decay.last[:, None] * d_last_k
    keys, enters, total, d_A_p, of_b = _through_system(
      shape, chunk, A_p, d, d.turned(d_last_k, d_last_Ak), b_0
    )
    G_p = gpu_momentum.before(chunk.gate, chunk.marks)
    between = between + shape.dots.tn(G_p, d_A_p)
    end, total = end + jnp.sum(d_last), total - d_last
    d_k, total_b = d_k + keys, total_b + of_b
  B = gpu_momentum.pushes(chunk.total_b, chunk.marks)
  between = _rows(between, B)
  total = total - between + at_end(C, end)
  zero = jnp.zeros_like(enters)
  tokens = Tokens(d_k, jnp.zeros_like(d_k), total, enters, zero)
  return tokens, total_b + between


def _through_system(shape, chunk, A_p, d: Reached, turned, b_0):
  """Of (k, log (eta g_p), log g, A_p, total_b) by L, P, ld and ls."""
  decay, push, dots = chunk.decay, chunk.push, shape.dots
  k, eta, (d_L, d_P) = chunk.k.astype(jnp.float32), decay.eta, turned
  of_L = -gpu_gates.coupling(chunk.gate, chunk.marks) * d_L
  d_P = eta[:, None] * d_P
  of_P = (A_p.astype(jnp.float32) * d_P).astype(shape.dtype)
  of_L = of_L.astype(shape.dtype)
  # sums over rows and columns of what is beside (k k^T)
  rows = dots.nn(of_L, chunk.k) + dots.nn(of_P, chunk.k)
  columns_L, columns_P = dots.tn(of_L, chunk.k), dots.tn(of_P, chunk.k)
  enters = _rows(rows, k)
  total, total_b = -_rows(columns_L, k), -_rows(columns_P, k)
  d_k = rows + columns_L + columns_P
  d_ls = d.ls()
  d_c_p = -eta * _rows(d_ls, k)
  d_k = d_k - (eta * push.c_p)[:, None] * d_ls
  d_ld = -decay.eta_g[:, None] * d.ld()
  d_k = d_k + d_ld
  enters = enters + d_c_p * push.c_p + _rows(d_ld, k)
  d_A_p = dots.nt(chunk.k, chunk.k) * d_P + first_column(b_0 * d_c_p)
  return d_k, enters, total + enters, d_A_p, total_b
