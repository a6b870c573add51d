"""Gradients of a chunk with momentum on a GPU's tiles; `d_x` is that of x.

See `gpu_adjoint`. Two sums of logarithms are told apart, `total` of the forget
gate and `total_b` of the momentum's. `A_p[t, i] = sum_s G_p[t, s] B[s, i]`
holds, besides those of t and i, a term `total_b - total` at each s between,
whose share is the diagonal of `G_p^T d_A_p B^T`; so does `c_p = G_p b`.

All is linear in what reaches the chunk, and found in three pieces: through U,
through P, and through the system with what it takes of the fast parts and
momenta. Each alone fits the registers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import gpu_adjoint, gpu_gates, gpu_momentum
from nestax.models.memory.gpu_layout import Shape

ROWS = ('total', 'enters', 'eta', 'total_b')


class Piece(NamedTuple):
  """Of a chunk's keys and values, and their scalars, see `gpu_adjoint`."""

  k: jax.Array  # [C, K]
  v: jax.Array | None
  rows: tuple  # ROWS, [C] float32


class Written(NamedTuple):
  """Of what a chunk writes; letters of `gpu_momentum`.

  Tiles are functions that make them, `[C, K]`, called where they are used up:
  all of them at once do not fit the registers.
  """

  last_Ak: Callable
  kb: Callable
  lw: Callable  # and of ld, for the tokens that read the fast parts
  target: Callable | None  # of `mem`, where it has one
  kept: float  # scalars: of what is kept of fast parts and momenta
  c: float
  b: float


class System(NamedTuple):
  """Of what the system is made of, likewise."""

  ld: Callable
  ls: Callable
  last_k: Callable
  L: Callable  # of d_last_k, `[C, C]`, its sign turned


def pieces(shape: Shape) -> int:
  return 3 if shape.cfg.delta else 1


def _rows(x, y):
  return jnp.sum(x * y, axis=1)


def put_piece(refs: Piece, j: int, at, piece: Piece) -> None:
  """Writes piece j, `at` a chunk or a head."""
  put_tile(refs.k, (*at, j), piece.k)
  if piece.v is not None:
    put_tile(refs.v, at, piece.v)
  for row, x in enumerate(piece.rows):
    refs.rows[(*at, j, row, slice(None))] = x


def put_tile(ref, at, x) -> None:
  ref[(*at, slice(None), slice(None))] = x.astype(ref.dtype)


def add_piece(piece: Piece, refs: Piece, j: int, at) -> Piece:
  """With piece j of the references."""
  v = piece.v
  if v is not None:
    v = v + refs.v[at].astype(jnp.float32)
  return Piece(
    piece.k + refs.k[(*at, j)].astype(jnp.float32),
    v,
    tuple(x + refs.rows[(*at, j, row, slice(None))]
          for row, x in enumerate(piece.rows)),
  )  # fmt: skip


def of_ratios(x, d_x):
  """Of `y [C]` in `x[t, i] = exp(y[t] - y[i])`.

  Both sums are of the same products: they cancel for the most part, and would
  leave the roundings of each.
  """
  d = x * d_x
  return jnp.sum(d, axis=1) - jnp.sum(d, axis=0)


def through_written(shape: Shape, chunk, d: Written) -> Piece:
  """Through U, what is kept, and the errors."""
  decay, push, C = chunk.decay, chunk.push, shape.C
  k, v = chunk.k.astype(jnp.float32), chunk.v.astype(jnp.float32)
  last = gpu_momentum.last_live(decay, chunk.marks)
  d_last_Ak = d.last_Ak()
  d_A = _rows(d_last_Ak, k)
  d_last_A = d_A * push.last_A
  d_k = push.last_A[:, None] * d_last_Ak
  B = gpu_momentum.pushes(shape.dots, chunk.total_b, chunk.marks)
  between = last * jnp.sum(B * d_A[None, :], axis=1)
  # the other way the sum is that of `last_A`
  total_b = between - d_last_A
  # of the momentum at the boundary, in the memory at the end
  of_c = last * push.b * d.c
  between, total_b = between + of_c, total_b + of_c
  d_kb = push.last_b[:, None] * d.kb()
  d_last_b = _rows(d_kb, k)
  d_k, total_b = d_k + d_kb, total_b - d_last_b
  total_b = total_b + gpu_gates.at_end(C, jnp.sum(d_last_b) + push.b_end * d.b)
  end = jnp.sum(d_last_A) + decay.kept * d.kept + push.c_end * d.c
  targets = [] if d.target is None else [('mem', d.target())]
  errors = gpu_adjoint.through_errors(shape, decay, k, v, d.lw(), targets)
  total = gpu_gates.at_end(C, end) - between
  none = jnp.zeros_like(total)
  return Piece(d_k + errors.k, errors.v, (total, none, errors.eta, total_b))


def through_P(shape: Shape, chunk, A_p, d_P) -> Piece:
  """Through P, of which `d_P [C, C]` is the gradient."""
  dots = shape.dots
  d_P = chunk.decay.eta[:, None] * d_P
  of_P = (A_p.astype(jnp.float32) * d_P).astype(shape.dtype)
  d_k = dots.nn(of_P, chunk.k) + dots.tn(of_P, chunk.k)
  d_A_p = dots.nt(chunk.k, chunk.k) * d_P
  B = gpu_momentum.pushes(shape.dots, chunk.total_b, chunk.marks)
  G_p = gpu_momentum.before(shape.dots, chunk.gate, chunk.marks)
  of_G_p = G_p * dots.nt(d_A_p, B)
  enters = jnp.sum(of_G_p, axis=1)
  total_b = of_ratios(B, dots.tn(G_p, d_A_p))
  total = enters - jnp.sum(of_G_p, axis=0)
  return Piece(d_k, None, (total, enters, jnp.zeros_like(total), total_b))


def through_system(shape: Shape, chunk, d: System) -> Piece:
  """Through L, ld and ls, and the keys that Z is written with."""
  decay, push, dots = chunk.decay, chunk.push, shape.dots
  k, coupling = chunk.k.astype(jnp.float32), None
  coupling = gpu_gates.coupling(shape.dots, chunk.gate, chunk.marks)
  d_last_k = d.last_k()
  d_last = decay.last * _rows(d_last_k, k)
  d_k = decay.last[:, None] * d_last_k
  of_L = (-coupling * d.L(d_last_k)).astype(shape.dtype)
  rows, columns = dots.nn(of_L, chunk.k), dots.tn(of_L, chunk.k)
  enters, total = _rows(rows, k), -d_last - _rows(columns, k)
  d_k = d_k + rows + columns
  d_ls = d.ls()
  of_c_p = -_rows(d_ls, k)  # over eta
  d_k = d_k - (decay.eta * push.c_p)[:, None] * d_ls
  # a token reads what is before it: its own gate is not in it
  between = jnp.sum(coupling * of_c_p[:, None], axis=0) * push.b
  if push.live is not None:
    between = push.live * between
  d_ld = -decay.eta_g[:, None] * d.ld()
  d_k = d_k + d_ld
  enters = enters + decay.eta * push.c_p * of_c_p + _rows(d_ld, k)
  total = total + enters - between + gpu_gates.at_end(shape.C, jnp.sum(d_last))
  zero = jnp.zeros_like(total)
  return Piece(d_k, None, (total, enters, zero, between))
