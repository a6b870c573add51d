"""Gradients of a chunk with momentum on a GPU's tiles; `d_x` is that of x.

See `gpu_adjoint`. Two sums of logarithms are told apart, `total` of the forget
gate and `total_b` of the momentum's. `A_p[t, i] = sum_s G_p[t, s] B[s, i]`
holds, besides those of t and i, a term `total_b - total` at each s between,
whose share is the diagonal of `G_p^T d_A_p B^T`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import gpu_gates, gpu_momentum
from nestax.models.memory.gpu_adjoint import Tokens


class Reached(NamedTuple):
  """Of what a chunk is made of; None: nothing. Letters of `gpu_momentum`."""

  ld: jax.Array | None  # [C, K]
  ls: jax.Array | None
  last_k: jax.Array | None
  last_Ak: jax.Array
  kb: jax.Array
  L: jax.Array | None  # of the system, [C, C], its sign turned
  P: jax.Array | None
  kept: jax.Array  # scalars: of what is kept of fast parts and momenta
  c: jax.Array
  b: jax.Array
  A_p: jax.Array | None = None  # more of it by the output, [C, C]
  c_p: jax.Array | None = None  # [C]


def _rows(x, y):
  return jnp.sum(x * y, axis=1)


def at_end(C: int, scalar):
  return jnp.where(gpu_gates.iota((C,), 0) == C - 1, scalar, 0.0)


def through_chunk(shape, chunk, A_p, d: Reached):
  """(Tokens, gradient of total_b) by all that stands in `d`."""
  decay, push, cfg = chunk.decay, chunk.push, shape.cfg
  k = chunk.k.astype(jnp.float32)
  B = gpu_momentum.pushes(chunk.total_b, chunk.marks)
  G_p = gpu_momentum.before(chunk.gate, chunk.marks)
  last = gpu_momentum.last_live(decay, chunk.marks)
  d_A = _rows(d.last_Ak, k)
  d_k = push.last_A[:, None] * d.last_Ak + push.last_b[:, None] * d.kb
  d_last_A = d_A * push.last_A
  d_last_b = push.last_b * _rows(d.kb, k)
  total_b = at_end(shape.C, jnp.sum(d_last_b) + push.b_end * d.b)
  total_b = total_b - d_last_A - d_last_b
  end = jnp.sum(d_last_A) + decay.kept * d.kept + push.c_end * d.c
  d_A_p, d_c_p = d.A_p, d.c_p
  enters = total = jnp.zeros_like(decay.eta)
  if cfg.delta:
    keys, enters, total, d_steps, of_c, of_b = _through_system(
      shape, chunk, A_p, G_p, d
    )
    d_k, total_b = d_k + keys, total_b + of_b
    d_A_p = d_steps if d_A_p is None else d_A_p + d_steps
    d_c_p = of_c if d_c_p is None else d_c_p + of_c
    d_last = decay.last * _rows(d.last_k, k)
    d_k = d_k + decay.last[:, None] * d.last_k
    end, total = end + jnp.sum(d_last), total - d_last
  between = last * (jnp.sum(B * d_A[None, :], axis=1) + push.b * d.c)
  if d_A_p is not None:
    between = between + _rows(shape.dots.tn(G_p, d_A_p), B)
    between = between + push.b * jnp.sum(G_p * d_c_p[:, None], axis=0)
  total = total - between + at_end(shape.C, end)
  zero = jnp.zeros_like(enters)
  tokens = Tokens(d_k, jnp.zeros_like(d_k), total, enters, zero)
  return tokens, total_b + between


def _through_system(shape, chunk, A_p, G_p, d: Reached):
  """Of (k, log (eta g_p), log g, A_p, c_p, total_b) by L, P, ld and ls."""
  decay, push, dots = chunk.decay, chunk.push, shape.dots
  k, eta = chunk.k.astype(jnp.float32), decay.eta
  kk = dots.nt(chunk.k, chunk.k)
  of_L = -eta[:, None] * G_p * d.L
  of_P = eta[:, None] * A_p.astype(jnp.float32) * d.P
  d_c_p = -eta * _rows(d.ls, k)
  d_kk = (of_L + of_P).astype(shape.dtype)
  d_k = dots.nn(d_kk, chunk.k) + dots.tn(d_kk, chunk.k)
  d_k = d_k - decay.eta_g[:, None] * d.ld
  d_k = d_k - (eta * push.c_p)[:, None] * d.ls
  enters = d_c_p * push.c_p - decay.eta_g * _rows(d.ld, k)
  enters = enters + _rows(of_L + of_P, kk)
  total = enters - jnp.sum(of_L * kk, axis=0)
  d_A_p = eta[:, None] * kk * d.P
  return d_k, enters, total, d_A_p, d_c_p, -jnp.sum(of_P * kk, axis=0)
