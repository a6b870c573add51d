"""A chunk of matrix memories in the terms of a GPU's tiles.

The mathematics is that of `chunk.chunk_step`; what is written here is what
Triton can lower: sizes are powers of two, nothing is sliced or joined in
registers. Boundary and running fast parts are the same, for the chunks are of
one size and each starts at a boundary. With p the point at which errors are
read, `eta_g = eta g_p`, and T the inverse of the chunk's system, each memory
is written by itself:

  rhs = W lw^T + D ld^T - target (eta .)^T,     Z = rhs T^T
  lw = -eta p,  ld = -eta p - eta_g k,          D_C = g_C D + Z last_k

Rows of Z are those of the memory, columns are tokens. The gates' memories lie
the other way round, a gate a column.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.gpu_gates import Decays, iota

COLUMNS = 16  # of a tile of gates: the narrowest that the matrix units take


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

  def tn_wide(self, a, b):
    """`a^T b`, b float32 and not rounded."""
    if self.dtype == jnp.float32:
      return self.tn(a, b)
    high = b.astype(self.dtype)
    return self.tn(a, high) + self.tn(a, b - high.astype(jnp.float32))

  def exact(self, x, w):
    """`x w`, exact to about 1e-5 whatever the dtype."""
    if self.dtype == jnp.float32:
      return self.nn(x, w)
    high = w.astype(self.dtype)
    y = self.nn(x, high) + self.nn(x, w - high.astype(jnp.float32))
    if x.dtype == self.dtype:
      return y
    return y + self.nn(x - x.astype(self.dtype).astype(x.dtype), high)


class Sides(NamedTuple):
  """A chunk's left-hand sides, `[C, K]` in the matmuls' dtype.

  Narrow from the start: wide tiles of everything do not fit the registers.
  """

  lw: jax.Array
  ld: jax.Array
  k: jax.Array
  last_k: jax.Array


def unit(x):
  norm = jax.lax.rsqrt(jnp.sum(x * x, axis=1) + 1e-6)
  return x * norm[:, None], norm


def unit_back(d_y, y, norm):
  """Gradient of x, where y is x over its norm; norm None: y is x."""
  if norm is None:
    return d_y
  return norm[:, None] * (d_y - y * jnp.sum(d_y * y, axis=1)[:, None])


def settled(dots: Dots, x):
  """A sum of tiles as one tile, by a matmul with ones on the diagonal.

  The compiler repeats sums for every layout in which they are read, and keeps
  all their terms in registers until then; it does not repeat matmuls.
  """
  n = x.shape[1]
  one = jnp.where(iota((n, n), 0) == iota((n, n), 1), 1.0, 0.0)
  return dots.nn(x, one)


def turned_round(dots: Dots, x, zero=0):
  """`x^T`, by a matmul with ones on the diagonal; `zero` as in `inverse`."""
  n = x.shape[1]
  one = jnp.where(iota((n, n), 0) + zero == iota((n, n), 1), 1.0, 0.0)
  return dots.nt(one, x)


def column(x, j: int):
  """Column j of a narrow tile, as a vector."""
  return jnp.sum(jnp.where(iota(x.shape, 1) == j, x, 0.0), axis=1)


def columns(vectors):
  """The tile `[C, COLUMNS]` that begins with these columns."""
  place = iota((vectors[0].shape[0], COLUMNS), 1)
  parts = [
    jnp.where(place == j, x[:, None], 0.0) for j, x in enumerate(vectors)
  ]
  return sum(parts[1:], parts[0])


def read(dots: Dots, x_CxK, slow_KxK, fast_KxK, alive):
  """`(W + D) x`, the fast part only for tokens whose document it has read."""
  if alive is None:
    return dots.nt(x_CxK, slow_KxK + fast_KxK)
  y = dots.nt(alive[:, None] * x_CxK, fast_KxK)
  return y + dots.nt(x_CxK, slow_KxK)


def point(cfg, k, v):
  """Where the memories are read for the inner gradients: reads are linear."""
  at = k if cfg.objective == 'l2' else jnp.zeros_like(k)
  return at - v if cfg.generated else at


def has_point(cfg) -> bool:
  """Whether memories are read for the inner gradients at all."""
  return cfg.objective == 'l2' or cfg.generated


def at_point(cfg, box) -> bool:
  """The target of a map's error is the point: `-eta target` is lw."""
  return cfg.objective == 'l2' and cfg.generated and box in cfg.identity


def takes_key(cfg, box) -> bool:
  """Whether a map's target holds, besides the value, the key turned round."""
  return cfg.objective == 'l2' and box in cfg.identity


def target(cfg, box, k, v, eta):
  """What the target adds to `rhs^T`, `[C, K]`."""
  return eta[:, None] * (v - k if takes_key(cfg, box) else v)


def inverse(dots: Dots, L_CxC, zero):
  """`(I + L)^-1` of a strictly lower triangular tile.

  Pairs of blocks on the diagonal are joined, `[[A, 0], [-B L A, B]]`, from
  blocks of two on, all pairs of a size in two matmuls. `zero` is 0, and not
  known to the compiler: masks that are the same for all chunks it would keep
  in registers, of which there are too few.
  """
  C = L_CxC.shape[0]
  # where rows and columns part: in the lowest bits, inside a block
  apart = (iota((C, C), 0) + zero) ^ iota((C, C), 1)
  minus = -L_CxC
  T = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, minus, 0.0))
  T, minus, bits = T.astype(dots.dtype), minus.astype(dots.dtype), 1
  while (1 << bits) < C:
    # of all pairs of blocks, those that are joined now
    below = jnp.where((apart >> bits) == 1, dots.nn(minus, T), 0.0)
    # every entry is rounded once: times one it stays what it is
    T = dots.nn(T, jnp.where(apart == 0, 1.0, below)).astype(dots.dtype)
    bits += 1
  return T


def sides(cfg, dots, k, v, decay: Decays) -> Sides:
  """Everything that multiplies a memory from the right."""
  eta = decay.eta[:, None]
  lw = -eta * point(cfg, k, v)
  ld = lw if decay.alive is None else lw * decay.alive[:, None]
  if cfg.delta:
    ld = ld - decay.eta_g[:, None] * k
  wide = (lw, ld, k, decay.last[:, None] * k)
  return Sides(*(x.astype(dots.dtype) for x in wide))
