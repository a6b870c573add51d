"""The backward pass on a GPU by way of the output and `mem`: chunk by chunk.

`by_output` finds what reaches the fast part of `mem` by the output, which
`gpu_carry` then takes back over the chunks; `parts` finds from both what
reaches the tokens, every chunk by itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_adjoint, gpu_gates, gpu_tile
from nestax.models.memory.gpu_layout import (
  Shape,
  array,
  call,
  groups,
  marks_of,
  over_group,
  put,
  put_rows,
  put_tokens,
  query_of,
  scalars_of,
  tokens_of,
)

WARPS = 4
STAGES = 2


class Parts(NamedTuple):
  """What reaches a chunk's tokens by `mem`, `[B, H, n, ...]`."""

  k: jax.Array  # [C, K]
  v: jax.Array
  scalars: jax.Array  # the rest of `gpu_adjoint.Tokens`, [3, C], float32


def by_output(shape: Shape, stream, saved, d_out):
  """Of (the fast part of `mem`, its right-hand sides), None if not read so."""
  B, H = stream.query.shape[0], stream.query.shape[2]
  make, C, K = array(shape, B, H), shape.C, shape.K
  walked = saved.walked._replace(D=None, D_gates=None, Z=None, Z_gates=None)
  return call(
    _by_output_kernel, shape, (groups(shape), H, B), (stream, walked, d_out),
    (make(K, K), make(C, K) if shape.cfg.read == 'token' else None),
    'memory_by_output', WARPS, STAGES,
  )  # fmt: skip


def _by_output_kernel(
  shape: Shape, stream, walked, d_out_ref, d_mem, d_rhs_ref
):
  def chunk(at, _):
    refs = stream, walked, d_out_ref, d_mem, d_rhs_ref
    _by_output_chunk(shape, refs, at)

  over_group(shape, chunk)


def _by_output_chunk(shape: Shape, refs, at):
  cfg, dots = shape.cfg, shape.dots
  stream, walked, d_out_ref, d_mem, d_rhs_ref = refs
  b, h, i = at
  marks = marks_of(stream, at)
  gate, *_ = scalars_of(shape, walked.scalars, at)
  decay = gpu_gates.decays(gate, marks)
  d_out = tokens_of(shape, d_out_ref, at).astype(shape.dtype)
  q, _ = query_of(shape, stream, at)
  if cfg.read != 'token':
    q = q if decay.alive is None else decay.alive[:, None] * q
    put(d_mem, at, dots.tn(d_out, q))
    return
  k, v = (x[b, h, i].astype(jnp.float32) for x in (walked.k, walked.v))
  side = gpu_tile.sides(cfg, dots, k, v, decay)
  qk = gpu_gates.within(dots, gate, marks) * dots.nt(q, side.k)
  d_rhs = dots.tn(qk, d_out)
  if cfg.delta:
    # all gradients come by way of it: rounded once, at last
    d_rhs = dots.tn_wide(walked.T[b, h, i], d_rhs)
  d_rhs = d_rhs.astype(shape.dtype)
  put(d_rhs_ref, at, d_rhs)
  d_read = dots.tn(d_out, decay.g[:, None] * q)
  put(d_mem, at, d_read + dots.tn(d_rhs, side.ld))


def parts(shape: Shape, slow, stream, saved, d_rhs, d_mem, d_out):
  """(Parts, gradient of the query, of the right-hand sides of `mem`).

  Args:
    shape: of the walk.
    slow: slow values.
    stream: inputs.
    saved: of the forward pass.
    d_rhs: of right-hand sides by the output, see `by_output`.
    d_mem: of the fast part of `mem` after each chunk.
    d_out: of the output.
  """
  B, _, H, K = stream.query.shape
  make, C = array(shape, B, H), shape.C
  walked = saved.walked._replace(D=None, D_gates=None, Z=None, Z_gates=None)
  saved = saved._replace(walked=walked)
  return call(
    _parts_kernel, shape, (shape.n, H, B),
    (slow.maps['mem'], stream, saved, d_rhs, d_mem, d_out),
    (Parts(make(C, K), make(C, K), make(3, C, dtype='float32')),
     jax.ShapeDtypeStruct(stream.query.shape, stream.query.dtype),
     make(C, K)),
    'memory_parts', WARPS, 1,
  )  # fmt: skip


def _parts_kernel(shape: Shape, W, stream, saved, d_rhs_ref, d_mem_ref,
                  d_out_ref, parts, d_query, d_rhs_all):  # fmt: skip
  i, h, b = (pl.program_id(axis) for axis in range(3))
  at = b, h, i
  dots, walked = shape.dots, saved.walked
  marks = marks_of(stream, at)
  gate, *_ = scalars_of(shape, walked.scalars, at)
  decay = gpu_gates.decays(gate, marks)
  refs = W, stream, saved, d_out_ref, d_query
  tokens, d_L = _through_output(shape, refs, gate, decay, marks, at), None
  D, Z, d_mem = saved.D[b, h, i], saved.Z[b, h, i], d_mem_ref[b, h, i]
  turned_k, k = saved.linked.turned_k[b, h, i], walked.k[b, h, i]
  coupling = saved.linked.coupling[b, h, i] if shape.cfg.delta else None
  d_rhs = dots.nt(turned_k, d_mem)
  if d_rhs_ref is not None:
    of_output = d_rhs_ref[b, h, i]
    d_rhs = d_rhs + of_output.astype(jnp.float32)
    if shape.cfg.delta:
      d_L = dots.nt(of_output, Z)
  put(d_rhs_all, at, d_rhs)
  d_kept = jnp.sum(D.astype(jnp.float32) * d_mem.astype(jnp.float32))
  tokens = tokens + gpu_adjoint.through_end(
    shape, decay, coupling, k, turned_k, dots.nn(Z, d_mem), d_kept, d_L
  )
  k, v = k.astype(jnp.float32), walked.v[b, h, i].astype(jnp.float32)
  d_ld = dots.nn(d_rhs, D)
  tokens = tokens + gpu_adjoint.through_system(shape, decay, k, d_ld)
  d_sides = None
  if gpu_tile.has_point(shape.cfg):
    d_sides = gpu_adjoint.alive_only(decay, d_ld)
    d_sides = d_sides + dots.nn(d_rhs, W[h, :, :])
  tokens = tokens + gpu_adjoint.through_errors(
    shape, decay, k, v, d_sides, [('mem', d_rhs)]
  )
  put(parts.k, at, tokens.k)
  put(parts.v, at, tokens.v)
  put_rows(parts.scalars, at, tokens[2:])


def _through_output(shape: Shape, refs, gate, decay, marks, at):
  """Tokens by the read itself; writes the query's gradient."""
  cfg, dots = shape.cfg, shape.dots
  W, stream, saved, d_out_ref, d_query = refs
  b, h, i = at
  q, q_norm, d_out, d_q = asked(shape, W, stream, d_out_ref, at)
  d_read = dots.nn(d_out, saved.D[b, h, i])
  zero = jnp.zeros_like(decay.g)
  if cfg.read != 'token':
    alive = decay.alive
    d_q = d_q + (d_read if alive is None else alive[:, None] * d_read)
    put_tokens(shape, d_query, at, gpu_tile.unit_back(d_q, q, q_norm))
    none = jnp.zeros_like(q)
    return gpu_adjoint.Tokens(none, none, zero, zero, zero)
  d_read = decay.g[:, None] * d_read
  k, Z = saved.walked.k[b, h, i], saved.Z[b, h, i]
  d_qk = gpu_gates.within(dots, gate, marks) * dots.nt(d_out, Z)
  d_qk = d_qk.astype(shape.dtype)
  of_q, of_k = dots.nn(d_qk, k), dots.tn(d_qk, q)
  d_q = d_q + d_read + of_q
  put_tokens(shape, d_query, at, gpu_tile.unit_back(d_q, q, q_norm))
  # sums over rows and columns of d_qk * (q k^T)
  total = jnp.sum((d_read + of_q) * q, axis=1)
  total = total - jnp.sum(of_k * k.astype(jnp.float32), axis=1)
  none = jnp.zeros_like(q)
  return gpu_adjoint.Tokens(of_k, none, total, zero, zero)


def asked(shape: Shape, W, stream, d_out_ref, at):
  """(Query, its norm, the output's gradient, the query's by slow `W`)."""
  q, q_norm = query_of(shape, stream, at)
  wide = tokens_of(shape, d_out_ref, at)
  d_out = wide.astype(shape.dtype)
  d_q = shape.dots.nn(d_out, W[at[1], :, :])
  if 'mem' in shape.cfg.identity:
    d_q = d_q + wide
  return q, q_norm, d_out, d_q
