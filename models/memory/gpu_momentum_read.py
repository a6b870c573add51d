"""The way back through the output with momentum on a GPU: chunk by chunk.

Finds the gradients of queries, what reaches the fast part and momentum of
`mem` at the chunk's start, and what the output sends to tokens and to what
they write; the rest comes by `mem` after the chunk (`gpu_momentum_parts`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import (
  gpu_adjoint,
  gpu_gates,
  gpu_momentum,
  gpu_momentum_adjoint,
  gpu_parts,
  gpu_steps,
  gpu_tile,
)
from nestax.models.memory.gpu_layout import (
  Shape,
  array,
  call,
  put,
  put_rows,
  put_tokens,
  query_of,
  tokens_of,
)
from nestax.models.memory.gpu_momentum_link import system_P
from nestax.models.memory.gpu_momentum_output import Steps, steps_of

WARPS = 4


class Read(NamedTuple):
  """Gradients, `[B, H, n, ...]`; None where only the boundary is read."""

  mem: tuple  # of the fast part and momentum, [K, K]
  steps: Steps | None
  k: jax.Array | None  # [C, K]
  scalars: jax.Array | None  # of total, [1, C] float32
  gates: jax.Array | None  # of total and total_b, [2, C] float32


def read_back(shape: Shape, slow, stream, saved, d_out):
  """(Read, gradient of the query).

  Args:
    shape: of the walk.
    slow: slow values.
    stream: inputs.
    saved: (Walked, fast part and momentum of `mem`, its Steps).
    d_out: of the output.
  """
  B, _, H, K = stream.query.shape
  make, C = array(shape, B, H), shape.C
  outs = Read((make(K, K), make(K, K)), None, None, None, None)
  if shape.cfg.read == 'token':
    rows = [make(count, C, dtype='float32') for count in (1, 2)]
    outs = Read(outs.mem, steps_of(shape, B, H), make(C, K), *rows)
  walked, both, steps = saved
  bodies = _bodies(shape)
  return call(
    _read_kernel, shape, (H, B, len(bodies) * shape.n),
    (slow.maps['mem'], stream, (walked._replace(start=None), both, steps),
     d_out),
    (outs, jax.ShapeDtypeStruct(stream.query.shape, stream.query.dtype)),
    'memory_momentum_read', WARPS, 1,
  )  # fmt: skip


def _bodies(shape: Shape):
  """What a chunk's programs find."""
  if shape.cfg.read != 'token':
    return (_of_boundary,)
  return _to_tokens, _to_gates, _of_mem


def _read_kernel(shape: Shape, W, stream, saved, d_out_ref, read, d_query):
  refs = W, stream, saved, d_out_ref, read, d_query
  gpu_steps.each_chunk(
    *(functools.partial(f, shape, refs) for f in _bodies(shape))
  )


def _of_boundary(shape: Shape, refs, at):
  """All, where queries read what a chunk begins with."""
  W, stream, (walked, both, _), d_out_ref, read, d_query = refs
  dots, chunk = shape.dots, gpu_momentum.here(shape, stream, walked, at)
  q, q_norm, d_out, d_q = gpu_parts.asked(shape, W, stream, d_out_ref, at)
  d_read = dots.nn(d_out, both[0][at])
  d_q = d_q + gpu_adjoint.alive_only(chunk.decay, d_read)
  put_tokens(shape, d_query, at, gpu_tile.unit_back(d_q, q, q_norm))
  q = gpu_adjoint.alive_only(chunk.decay, q)
  put(read.mem[0], at, dots.tn(d_out, q))
  put(read.mem[1], at, jnp.zeros((shape.K, shape.K), jnp.float32))


def _to_tokens(shape: Shape, refs, at):
  """Gradients of queries and of the keys that they meet."""
  W, stream, (walked, both, steps), d_out_ref, read, d_query = refs
  dots = shape.dots
  chunk = gpu_momentum.here(shape, stream, walked, at)
  q, q_norm, d_out, d_q = gpu_parts.asked(shape, W, stream, d_out_ref, at)
  d_read = chunk.decay.g[:, None] * dots.nn(d_out, both[0][at])
  total = jnp.sum(d_read * q, axis=1)
  d_q = d_q + d_read + chunk.push.c[:, None] * dots.nn(d_out, both[1][at])
  A = gpu_momentum.running_A(shape.dots, chunk, walked.A_p[at])
  of_A = (A * dots.nt(d_out, steps.U[at])).astype(shape.dtype)
  rows, columns = dots.nn(of_A, chunk.k), dots.tn(of_A, q)
  if shape.cfg.delta:
    G = gpu_gates.within(shape.dots, chunk.gate, chunk.marks)
    of_G = (G * dots.nt(d_out, steps.Z[at])).astype(shape.dtype)
    more_rows, more = dots.nn(of_G, chunk.k), dots.tn(of_G, q)
    total = total + jnp.sum(more_rows * q, axis=1)
    total = total - jnp.sum(more * chunk.k.astype(jnp.float32), axis=1)
    rows, columns = rows + more_rows, columns + more
  put(read.k, at, columns)
  put_rows(read.scalars, at, (total,))
  put_tokens(shape, d_query, at, gpu_tile.unit_back(d_q + rows, q, q_norm))


def _to_gates(shape: Shape, refs, at):
  """What reaches the products of gates with which steps are read."""
  _, stream, (walked, both, steps), d_out_ref, read, _ = refs
  dots, chunk = shape.dots, gpu_momentum.here(shape, stream, walked, at)
  push = chunk.push
  q, d_out = _asked(shape, stream, d_out_ref, at)
  d_c = jnp.sum(dots.nn(d_out, both[1][at]) * q, axis=1)
  # of A itself, in which c is the first column times the first gate
  d_A = dots.nt(q, chunk.k) * dots.nt(d_out, steps.U[at])
  d_A = d_A + _first_column(_first(push.b) * d_c)
  G_p = gpu_momentum.before(shape.dots, chunk.gate, chunk.marks)
  B = gpu_momentum.pushes(shape.dots, chunk.total_b, chunk.marks)
  d_B = dots.tn(G_p, push.alpha[:, None] * d_A)
  d_B = d_B + (d_A if push.live is None else push.live[:, None] * d_A)
  total = gpu_momentum_adjoint.of_ratios(
    push.alpha[:, None] * G_p, dots.nt(d_A, B)
  )
  # the boundary's momentum is no token's
  given = jnp.where(gpu_gates.iota(d_c.shape, 0) == 0, jnp.sum(push.c * d_c), 0)
  total_b = gpu_momentum_adjoint.of_ratios(B, d_B) + given
  put_rows(read.gates, at, (total, total_b))


def _asked(shape: Shape, stream, d_out_ref, at):
  """(Query, the output's gradient)."""
  d_out = tokens_of(shape, d_out_ref, at).astype(shape.dtype)
  return query_of(shape, stream, at)[0], d_out


def _of_mem(shape: Shape, refs, at):
  """Writes what reaches `mem` at the chunk's start, and the steps."""
  _, stream, (walked, *_), d_out_ref, read, _ = refs
  cfg, dots, (b, h, i) = shape.cfg, shape.dots, at
  chunk = gpu_momentum.here(shape, stream, walked, at)
  side = gpu_momentum.sides_of(shape, chunk)
  q, d_out = _asked(shape, stream, d_out_ref, at)
  qk, A_p = dots.nt(q, chunk.k), walked.A_p[b, h, i]
  d_U = dots.tn(gpu_momentum.running_A(shape.dots, chunk, A_p) * qk, d_out)
  of_D = dots.tn(d_out, chunk.decay.g[:, None] * q)
  of_S = dots.tn(d_out, chunk.push.c[:, None] * q)
  if cfg.delta:
    G = gpu_gates.within(shape.dots, chunk.gate, chunk.marks)
    d_R = dots.tn(walked.T[b, h, i], dots.tn(G * qk, d_out))
    d_R = d_R.astype(shape.dtype)
    put(read.steps.Z, at, d_R)
    d_U = d_U - dots.tn(system_P(shape, chunk, A_p), d_R)
    of_D = of_D + dots.tn(d_R, side.ld)
    of_S = of_S + dots.tn(d_R, side.ls)
  d_U = d_U.astype(shape.dtype)
  put(read.steps.U, at, d_U)
  put(read.mem[0], at, of_D + dots.tn(d_U, side.alive_lw))
  put(read.mem[1], at, of_S)


def _first(x_C):
  """The first entry of `[C]`, as a scalar."""
  return jnp.sum(jnp.where(gpu_gates.iota(x_C.shape, 0) == 0, x_C, 0.0))


def _first_column(x_C):
  """The tile `[C, C]` that begins with this column, else zero."""
  C = x_C.shape[0]
  return jnp.where(gpu_gates.iota((C, C), 1) == 0, x_C[:, None], 0.0)
