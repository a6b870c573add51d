"""A chunk of matrix memories in the terms of a GPU's tiles.

The mathematics is that of `chunk.chunk_step`; what is written here is what
Triton can lower: sizes are powers of two, nothing is sliced or joined in
registers. The stack of all memories, gates too, is one tile `[N, K]` padded
with zeros, so that a chunk's reads and writes of all of them are one matmul
each; what belongs to one memory is cut out by way of global memory, which a
walk's own block finds in its cache. Boundary and running fast parts are the
same, for the chunks are of one size and each starts at a boundary. Rows of Z
and of right-hand sides are those of the stack, columns are tokens:

  rhs = W lw^T + D ld^T - target (eta .)^T,     Z = rhs T^T
  lw = -eta p,  ld = -eta p - eta_g k,          D_C = g_C D + Z last_k

where p is the point at which errors are read, `eta_g = eta g_p`, and T the
inverse of the chunk's system.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.gpu_gates import Decays, iota


class Dots(NamedTuple):
  """Matmuls of tiles: operands in `dtype`, sums in float32."""

  dtype: jnp.dtype
  interpret: bool

  def _dot(self, a, b, dims):
    precision = None
    if self.dtype == jnp.float32:
      # three products of tf32 parts: exact to about 1e-6
      precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
      precision = 'highest' if self.interpret else precision
    return jax.lax.dot_general(
      a.astype(self.dtype),
      b.astype(self.dtype),
      (dims, ((), ())),
      precision=precision,
      preferred_element_type=jnp.float32,
    )

  def nn(self, a, b):
    """`a b`."""
    return self._dot(a, b, ((1,), (0,)))

  def nt(self, a, b):
    """`a b^T`."""
    return self._dot(a, b, ((1,), (1,)))

  def tn(self, a, b):
    """`a^T b`."""
    return self._dot(a, b, ((0,), (0,)))


class Sides(NamedTuple):
  """A chunk's left-hand sides, `[C, K]` in the matmuls' dtype.

  Narrow from the start: wide tiles of everything do not fit the registers.
  """

  lw: jax.Array
  ld: jax.Array
  k: jax.Array
  last_k: jax.Array
  eta_k: jax.Array
  eta_v: jax.Array


def unit(x):
  norm = jax.lax.rsqrt(jnp.sum(x * x, axis=1) + 1e-6)
  return x * norm[:, None], norm


def unit_back(d_y, y, norm):
  return norm[:, None] * (d_y - y * jnp.sum(d_y * y, axis=1)[:, None])


def read(dots: Dots, x_CxK, slow_KxK, fast_KxK, alive):
  """`(W + D) x`, the fast part only for tokens whose document it has read."""
  if alive is None:
    return dots.nt(x_CxK, slow_KxK + fast_KxK)
  y = dots.nt(alive[:, None] * x_CxK, fast_KxK)
  return y + dots.nt(x_CxK, slow_KxK)


def point(cfg, k, v):
  """Where the stack is read for the inner gradients: the reads are linear."""
  at = k if cfg.objective == 'l2' else jnp.zeros_like(k)
  return at - v if cfg.generated else at


def at_point(cfg, box) -> bool:
  """The target of a map's error is the point: `-eta target` is lw."""
  return cfg.objective == 'l2' and cfg.generated and box in cfg.identity


def inverse(dots: Dots, L_CxC):
  """`(I + L)^-1` of a strictly lower triangular tile.

  Pairs of blocks on the diagonal are joined, `[[A, 0], [-B L A, B]]`, from
  blocks of two on, all pairs of a size in two matmuls.
  """
  C = L_CxC.shape[0]
  # where rows and columns part: in the lowest bits, inside a block
  apart = iota((C, C), 0) ^ iota((C, C), 1)
  T = jnp.where(apart == 0, 1.0, 0.0) - jnp.where(apart == 1, L_CxC, 0.0)
  L, bits = L_CxC.astype(dots.dtype), 1
  while (1 << bits) < C:
    corner = jnp.where((apart >> bits) == 1, L, jnp.zeros_like(L))
    T = T - dots.nn(T, dots.nn(corner, T))
    bits += 1
  return T


def sides(cfg, dots, k, v, decay: Decays) -> Sides:
  """Everything that multiplies a stack from the right."""
  eta = decay.eta[:, None]
  lw = -eta * point(cfg, k, v)
  ld = lw if decay.alive is None else lw * decay.alive[:, None]
  if cfg.delta:
    ld = ld - decay.eta_g[:, None] * k
  wide = (lw, ld, k, decay.last[:, None] * k, eta * k, eta * v)
  return Sides(*(x.astype(dots.dtype) for x in wide))


def solution(dots, laid, D_NxK, side: Sides, T_CxC):
  """What the chunk's tokens write into the stack, Z `[N, C]`.

  Args:
    dots: the matmuls.
    laid: (slow stack with ones where targets are points, and what picks the
      rows whose target holds the value, the key; None for none), `[N, K]`.
    D_NxK: the fast parts.
    side: of the chunk.
    T_CxC: the inverse; None for no system.
  """
  folded, of_value, of_key = laid
  rhs = dots.nt(folded, side.lw) + dots.nt(D_NxK, side.ld)
  if of_value is not None:
    rhs = rhs + dots.nt(of_value, side.eta_v)
  if of_key is not None:
    rhs = rhs - dots.nt(of_key, side.eta_k)
  return rhs if T_CxC is None else dots.nt(rhs, T_CxC)
