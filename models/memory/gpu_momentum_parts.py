"""The backward pass with momentum on a GPU by way of `mem`: chunk by chunk.

What reaches the tokens from the output and from the fast part and momentum of
`mem` after each chunk, which `gpu_momentum_link` has taken back before.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import (
  gpu_adjoint,
  gpu_gates,
  gpu_momentum,
  gpu_momentum_adjoint,
  gpu_tile,
)
from nestax.models.memory.gpu_layout import (
  Shape,
  array,
  call,
  put,
  put_rows,
  put_tokens,
  tokens_of,
)
from nestax.models.memory.gpu_momentum_adjoint import Reached

WARPS = 4


class Parts(NamedTuple):
  """What reaches a chunk's tokens by `mem`, `[B, H, n, ...]`."""

  k: jax.Array  # [C, K]
  v: jax.Array
  # the rest of `gpu_adjoint.Tokens`, and of total_b, [4, C], float32
  scalars: jax.Array


def parts(shape: Shape, slow, stream, saved, d_steps, d_both, d_out):
  """(Parts, gradient of the query, of what is written into `mem`).

  Args:
    shape: of the walk.
    slow: slow values.
    stream: inputs.
    saved: (Walked, fast part and momentum of `mem`, its Steps).
    d_steps: of Steps by the output, see `by_output`.
    d_both: of fast part and momentum of `mem` after each chunk.
    d_out: of the output.
  """
  B, _, H, K = stream.query.shape
  make, C = array(shape, B, H), shape.C
  walked, both, steps = saved
  saved = walked._replace(start=None), both, steps
  return call(
    _parts_kernel, shape, (shape.n, H, B),
    (slow.maps['mem'], slow.folded['mem'], stream, saved, d_steps, d_both,
     d_out),
    (Parts(make(C, K), make(C, K), make(4, C, dtype='float32')),
     jax.ShapeDtypeStruct(stream.query.shape, stream.query.dtype),
     make(C, K)),
    'memory_momentum_parts', WARPS, 1,
  )  # fmt: skip


def _parts_kernel(shape: Shape, W, folded, stream, saved, d_steps, d_both,
                  d_out, parts, d_query, d_U_ref):  # fmt: skip
  i, h, b = (pl.program_id(axis) for axis in range(3))
  at = b, h, i
  cfg, dots = shape.cfg, shape.dots
  walked, both, steps = saved
  chunk = gpu_momentum.here(shape, stream, walked, at)
  decay, A_p = chunk.decay, walked.A_p[b, h, i]
  D, S = (ref[b, h, i] for ref in both)
  E, F = (ref[b, h, i] for ref in d_both)
  U = steps.U[b, h, i]
  refs = W, stream, d_out, d_query
  d_A_p, d_c_p, tokens, total_b = _through_output(
    shape, refs, chunk, A_p, (D, S), steps, at
  )
  side = gpu_momentum.sides_of(shape, chunk)
  d_U = dots.nt(walked.ku[b, h, i], E) + dots.nt(side.kb, F)
  d_R = None
  if d_steps is not None:
    d_U = d_U + d_steps.U[b, h, i].astype(jnp.float32)
  d_U = d_U.astype(shape.dtype)
  put(d_U_ref, at, d_U)
  ld = ls = last_k = d_L = d_P = None
  if cfg.delta:
    Z = steps.Z[b, h, i]
    d_R = dots.nt(walked.turned_k[b, h, i], E)
    if d_steps is not None:
      d_R = d_R + d_steps.Z[b, h, i].astype(jnp.float32)
    d_R = d_R.astype(shape.dtype)
    ld, ls, last_k = dots.nn(d_R, D), dots.nn(d_R, S), dots.nn(Z, E)
    d_L, d_P = dots.nt(d_R, Z), -dots.nt(d_R, U)
  wide = E.astype(jnp.float32), F.astype(jnp.float32), S.astype(jnp.float32)
  ends = (
    jnp.sum(wide[0] * D.astype(jnp.float32)),
    jnp.sum(wide[0] * wide[2]),
    jnp.sum(wide[1] * wide[2]),
  )
  reached = Reached(
    ld, ls, last_k, dots.nn(U, E), dots.nn(U, F), d_L, d_P, *ends, d_A_p, d_c_p
  )
  more, more_b = gpu_momentum_adjoint.through_chunk(shape, chunk, A_p, reached)
  k, v = chunk.k.astype(jnp.float32), chunk.v.astype(jnp.float32)
  d_sides = gpu_adjoint.alive_only(decay, dots.nn(d_U, D))
  d_sides = d_sides + dots.nn(d_U, folded[h, :, :])
  tokens = (
    tokens
    + more
    + gpu_adjoint.through_errors(
      shape, decay, k, v, d_sides, [('mem', d_U.astype(jnp.float32))]
    )
  )
  put(parts.k, at, tokens.k)
  put(parts.v, at, tokens.v)
  put_rows(parts.scalars, at, (*tokens[2:], total_b + more_b))


def _through_output(shape: Shape, refs, chunk, A_p, both, steps, at):
  """Of (A_p, c_p, Tokens, total_b) by the read; writes the query's."""
  cfg, dots = shape.cfg, shape.dots
  W, stream, d_out_ref, d_query = refs
  decay, push, (b, h, i) = chunk.decay, chunk.push, at
  query = tokens_of(shape, stream.query, at).astype(jnp.float32)
  q, q_norm = gpu_tile.unit(query)
  wide = tokens_of(shape, d_out_ref, at)
  d_out = wide.astype(shape.dtype)
  d_q = dots.nn(d_out, W[h, :, :])
  if 'mem' in cfg.identity:
    d_q = d_q + wide
  D, S = both
  d_read = dots.nn(d_out, D)
  zero = jnp.zeros_like(decay.g)
  if cfg.read != 'token':
    d_q = d_q + gpu_adjoint.alive_only(decay, d_read)
    put_tokens(shape, d_query, at, gpu_tile.unit_back(d_q, q, q_norm))
    return None, None, gpu_adjoint.none(shape), zero
  d_read, d_push = decay.g[:, None] * d_read, dots.nn(d_out, S)
  qk, d_A = dots.nt(q, chunk.k), dots.nt(d_out, steps.U[b, h, i])
  B = gpu_momentum.pushes(chunk.total_b, chunk.marks)
  B = B if push.live is None else push.live[:, None] * B
  of_A = push.alpha[:, None] * A_p.astype(jnp.float32)
  d_qk = (of_A + B) * d_A
  d_A = d_A * qk
  total = jnp.sum(d_read * q, axis=1) + jnp.sum(of_A * d_A, axis=1)
  total_b = jnp.sum(B * d_A, axis=1) - jnp.sum((of_A + B) * d_A, axis=0)
  if cfg.delta:
    G = gpu_gates.within(chunk.gate, chunk.marks)
    d_G = G * dots.nt(d_out, steps.Z[b, h, i])
    d_qk = d_qk + d_G
    total = total + jnp.sum(d_G * qk, axis=1) - jnp.sum(d_G * qk, axis=0)
  # of c, by which momenta are read: c = alpha c_p + b
  d_c = jnp.sum(d_push * q, axis=1)
  total = total + d_c * push.alpha * push.c_p
  of_b = d_c * push.b
  total_b = total_b + (of_b if push.live is None else push.live * of_b)
  d_qk = d_qk.astype(shape.dtype)
  d_q = d_q + d_read + push.c[:, None] * d_push + dots.nn(d_qk, chunk.k)
  put_tokens(shape, d_query, at, gpu_tile.unit_back(d_q, q, q_norm))
  of_k = dots.tn(d_qk, q)
  tokens = gpu_adjoint.Tokens(of_k, jnp.zeros_like(of_k), total, zero, zero)
  return push.alpha[:, None] * d_A, push.alpha * d_c, tokens, total_b
