"""The backward pass with momentum on a GPU by way of `mem`: chunk by chunk.

What reaches the tokens from the fast part and momentum of `mem` after each
chunk, which `gpu_momentum_link` has taken back before, and what
`gpu_momentum_read` has found of the output.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import (
  gpu_adjoint,
  gpu_momentum,
  gpu_momentum_adjoint,
)
from nestax.models.memory.gpu_layout import (
  Shape,
  array,
  call,
  put,
  put_rows,
)
from nestax.models.memory.gpu_momentum_adjoint import Reached

WARPS = 8


class Parts(NamedTuple):
  """What reaches a chunk's tokens by `mem`, `[B, H, n, ...]`."""

  k: jax.Array  # [C, K]
  v: jax.Array
  # the rest of `gpu_adjoint.Tokens`, and of total_b, [4, C], float32
  scalars: jax.Array


def parts(shape: Shape, slow, stream, saved, read, d_both):
  """(Parts, gradient of what is written into `mem`).

  Args:
    shape: of the walk.
    slow: slow values.
    stream: inputs.
    saved: (Walked, fast part and momentum of `mem`, its Steps).
    read: what came by the output, see `gpu_momentum_read`.
    d_both: of fast part and momentum of `mem` after each chunk.
  """
  B, H = stream.query.shape[0], stream.query.shape[2]
  make, C, K = array(shape, B, H), shape.C, shape.K
  walked, both, steps = saved
  saved = walked._replace(start=None), both, steps
  return call(
    _parts_kernel, shape, (shape.n, H, B),
    (slow.folded['mem'], stream, saved, read, d_both),
    (Parts(make(C, K), make(C, K), make(4, C, dtype='float32')), make(C, K)),
    'memory_momentum_parts', WARPS, 1,
  )  # fmt: skip


def _parts_kernel(shape: Shape, folded, stream, saved, read, d_both, parts,
                  d_U_ref):  # fmt: skip
  i, h, b = (pl.program_id(axis) for axis in range(3))
  at = b, h, i
  cfg, dots = shape.cfg, shape.dots
  walked, both, steps = saved
  chunk = gpu_momentum.here(shape, stream, walked, at)
  A_p = walked.A_p[b, h, i]
  D, S = (ref[b, h, i] for ref in both)
  E, F = (ref[b, h, i] for ref in d_both)
  U = steps.U[b, h, i]
  kb = gpu_momentum.sides_of(shape, chunk).kb
  d_U = dots.nt(walked.ku[b, h, i], E) + dots.nt(kb, F)
  if read.steps is not None:
    d_U = d_U + read.steps.U[b, h, i].astype(jnp.float32)
  d_U = d_U.astype(shape.dtype)
  put(d_U_ref, at, d_U)
  system = (None,) * 4
  if cfg.delta:
    Z = steps.Z[b, h, i]
    d_R = dots.nt(walked.turned_k[b, h, i], E)
    if read.steps is not None:
      d_R = d_R + read.steps.Z[b, h, i].astype(jnp.float32)
    d_R = d_R.astype(shape.dtype)
    system = (
      lambda: dots.nn(d_R, D),
      lambda: dots.nn(d_R, S),
      lambda: dots.nn(Z, E),
      lambda last_k, last_Ak: (dots.nt(d_R, Z), -dots.nt(d_R, U)),
    )
  wide = (x.astype(jnp.float32) for x in (D, S, E, F))
  D_, S_, E_, F_ = wide
  ends = jnp.sum(E_ * D_), jnp.sum(E_ * S_), jnp.sum(F_ * S_)
  reached = Reached(
    lambda: dots.nn(U, E), lambda: dots.nn(U, F), *system, *ends
  )
  tokens, total_b = gpu_momentum_adjoint.through_chunk(
    shape, chunk, A_p, reached
  )
  k, v = chunk.k.astype(jnp.float32), chunk.v.astype(jnp.float32)
  d_sides = gpu_adjoint.alive_only(chunk.decay, dots.nn(d_U, D))
  d_sides = d_sides + dots.nn(d_U, folded[h, :, :])
  tokens = tokens + gpu_adjoint.through_errors(
    shape, chunk.decay, k, v, d_sides, [('mem', d_U.astype(jnp.float32))]
  )
  d_k, (total, enters, eta) = tokens.k, tokens[2:]
  if read.steps is not None:
    d_k = d_k + read.k[b, h, i].astype(jnp.float32)
    total = total + read.scalars[b, h, i, 0, :]
    total_b = total_b + read.scalars[b, h, i, 1, :]
  put(parts.k, at, d_k)
  put(parts.v, at, tokens.v)
  put_rows(parts.scalars, at, (total, enters, eta, total_b))
