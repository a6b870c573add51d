"""A chunk of matrix memories in the terms of a GPU's tiles, forward.

The mathematics is that of `chunk.chunk_step`; what is written here is what
Triton can lower: sizes are powers of two, nothing is sliced or joined, every
map is a tile `[K, K]` of its own (rows as on the stack), a gate's memory one
row `[K]`. Boundary and running fast parts are the same, for the chunks are of
one size and each starts at a boundary.

The two reads that the inner gradients and the system need, at the boundary
and of the running parts, are joined by what they read: of the slow values
with `lw`, of the fast ones with `ld`,

  rhs = lw W^T + ld D^T - eta target,  lw = -eta p,  ld = -eta p - eta_g k

where p is the point at which errors are read and `eta_g = eta g_p`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.types import GATES, MemoryConfig

NEVER = -1e30  # the logarithm of zero, without its infinities


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


class Marks(NamedTuple):
  """Per token `[C]`; None where all are of one document, or live."""

  document: jax.Array | None  # how many began in this chunk so far
  live: jax.Array | None


class Loads:
  """Values by name, loaded where they are used: registers are few."""

  def __init__(self, load):
    self._load = load

  def __getitem__(self, name):
    return self._load(name)


class Slow(NamedTuple):
  """Slow values of one head."""

  maps: Loads  # box -> [K, K] in the matmuls' dtype
  rows: dict  # gate -> [K], both gates
  biases: dict  # gate -> scalar


class Fast(NamedTuple):
  """Fast parts of one head, or their gradients."""

  maps: dict | Loads  # box -> [K, K]
  rows: dict  # gate -> [K], of the gates that are memories


class Gates(NamedTuple):
  """A chunk's gates and their products from the boundary, `[C]` float32."""

  log_eta: jax.Array
  total: jax.Array  # log g
  before: jax.Array  # log g_p
  slope_eta: jax.Array  # of log eta by its logit
  slope_alpha: jax.Array


class Decays(NamedTuple):
  """Products of a chunk's gates; `[C]` and one scalar."""

  eta: jax.Array
  g: jax.Array
  eta_g: jax.Array
  last: jax.Array  # from each token to the chunk's end
  alive: jax.Array | None  # 1 where the boundary's document lasts
  kept: jax.Array  # of the fast parts, at the chunk's end


class Vectors(NamedTuple):
  """Keys and values of a chunk, and reciprocal norms where taken."""

  k_CxK: jax.Array
  v_CxK: jax.Array
  k_norm: jax.Array
  v_norm: jax.Array | None


class System(NamedTuple):
  """What a chunk's writes are solved from, in the matmuls' dtype.

  Narrow from the start: wide tiles of everything do not fit the registers.
  """

  T_CxC: jax.Array | None  # None: nothing to solve
  lw_CxK: jax.Array
  ld_CxK: jax.Array
  k_CxK: jax.Array
  last_k_CxK: jax.Array
  targets: tuple  # eta k, eta v where a target is not the point


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def end_of(x_C):
  """The last entry of `[C]`, as a scalar."""
  C = x_C.shape[0]
  return jnp.sum(jnp.where(iota((C,), 0) == C - 1, x_C, 0))


def unit(x):
  norm = jax.lax.rsqrt(jnp.sum(x * x, axis=1) + 1e-6)
  return x * norm[:, None], norm


def unit_back(d_y, y, norm):
  return norm[:, None] * (d_y - y * jnp.sum(d_y * y, axis=1)[:, None])


def log_sigmoid(x):
  return jnp.minimum(x, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(x)))


def gates(cfg: MemoryConfig, slow: Slow, fast: Fast, key_CxK, marks: Marks):
  """The gates of a chunk, read at its boundary in float32."""
  key = key_CxK.astype(jnp.float32)
  logits = {}
  for gate in GATES:
    row = slow.rows[gate][None, :]
    if gate in fast.rows and marks.document is None:
      row = row + fast.rows[gate][None, :]
    elif gate in fast.rows:
      alive = (marks.document == 0).astype(jnp.float32)
      row = row + alive[:, None] * fast.rows[gate][None, :]
    logits[gate] = jnp.sum(key * row, axis=1) + slow.biases[gate]
  log_eta = log_sigmoid(logits['eta']) + jnp.log(jnp.float32(cfg.eta_max))
  log_alpha = log_sigmoid(logits['alpha'])
  slopes = [1.0 / (1.0 + jnp.exp(logits[gate])) for gate in GATES]
  if not cfg.retention:
    log_alpha, slopes[1] = jnp.zeros_like(log_alpha), jnp.zeros_like(log_alpha)
  if marks.live is not None:
    live = marks.live != 0
    log_eta = jnp.where(live, log_eta, NEVER)
    log_alpha = jnp.where(live, log_alpha, 0.0)
    slopes = [jnp.where(live, slope, 0.0) for slope in slopes]
  total = jnp.cumsum(log_alpha)
  return Gates(log_eta, total, total - log_alpha, *slopes)


def decays(gate: Gates, marks: Marks) -> Decays:
  end = end_of(gate.total)
  eta, g = jnp.exp(gate.log_eta), jnp.exp(gate.total)
  eta_g = jnp.exp(gate.log_eta + gate.before)
  last, kept = jnp.exp(end - gate.total), jnp.exp(end)
  if marks.document is None:
    return Decays(eta, g, eta_g, last, None, kept)
  alive = (marks.document == 0).astype(jnp.float32)
  latest = jnp.max(marks.document)
  last = jnp.where(marks.document == latest, last, 0.0)
  kept = jnp.where(latest == 0, kept, 0.0)
  return Decays(eta, g * alive, eta_g * alive, last, alive, kept)


def _inside(rows, columns, marks: Marks, strict: bool):
  """`exp(rows[t] - columns[i])` for i up to t, of the same document."""
  C = rows.shape[0]
  row, column = iota((C, C), 0), iota((C, C), 1)
  mask = row > column if strict else row >= column
  if marks.document is not None:
    mask = mask & (marks.document[:, None] == marks.document[None, :])
  # masked before the exponential: above the diagonal it would overflow
  return jnp.exp(jnp.where(mask, rows[:, None] - columns[None, :], NEVER))


def within(gate: Gates, marks: Marks):
  """`G[t, i]`, the decay from token i to the running memory after t."""
  return _inside(gate.total, gate.total, marks, strict=False)


def coupling(gate: Gates, marks: Marks):
  """`eta_t G_p[t, i]`, by which earlier keys enter the system."""
  return _inside(gate.log_eta + gate.before, gate.total, marks, strict=True)


def read(dots: Dots, x_CxK, slow_KxK, fast_KxK, alive):
  """`(W + D) x`, the fast part only for tokens whose document it has read."""
  if alive is None:
    return dots.nt(x_CxK, slow_KxK + fast_KxK)
  y = dots.nt(alive[:, None] * x_CxK, fast_KxK)
  return y + dots.nt(x_CxK, slow_KxK)


def vectors(cfg, dots, slow: Slow, fast: Fast, key_CxK, value_CxK, alive):
  """Keys and values, from their memories at the boundary."""

  def box(name, x):
    y = x.astype(jnp.float32)
    if name not in cfg.boxes:
      return y
    out = read(dots, x, slow.maps[name], fast.maps[name], alive)
    return out + y if name in cfg.identity else out

  k, k_norm = unit(box('k', key_CxK))
  v, v_norm = box('v', value_CxK), None
  if cfg.value_norm:
    v, v_norm = unit(v)
  return Vectors(k, v, k_norm, v_norm)


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


def system(cfg, dots, vec: Vectors, decay, E_CxC) -> System:
  """The inverse and both left-hand sides."""
  k, v, eta = vec.k_CxK, vec.v_CxK, decay.eta[:, None]
  lw = -eta * point(cfg, k, v)
  ld = lw if decay.alive is None else lw * decay.alive[:, None]
  if cfg.delta:
    ld = ld - decay.eta_g[:, None] * k
  targets = (eta * k, eta * v)
  sides = (lw, ld, k, decay.last[:, None] * k)
  lw, ld, k, last_k = (x.astype(dots.dtype) for x in sides)
  targets = tuple(x.astype(dots.dtype) for x in targets)
  T = None
  if cfg.delta:
    T = inverse(dots, E_CxC * dots.nt(k, k)).astype(dots.dtype)
  return System(T, lw, ld, k, last_k, targets)


def writes(cfg, dots, box, W_KxK, D_KxK, solve: System):
  """What the chunk's tokens write into a map, Z `[C, K]`."""
  rhs = dots.nt(solve.lw_CxK, W_KxK) + dots.nt(solve.ld_CxK, D_KxK)
  if at_point(cfg, box):
    rhs = rhs + solve.lw_CxK.astype(jnp.float32)
  else:
    rhs = rhs + solve.targets[1].astype(jnp.float32)
    if cfg.objective == 'l2' and box in cfg.identity:
      rhs = rhs - solve.targets[0].astype(jnp.float32)
  return rhs if solve.T_CxC is None else dots.nn(solve.T_CxC, rhs)


def writes_row(w_K, r_K, solve: System):
  """What they write into a gate's memory, `[C]` float32."""
  lw, ld = solve.lw_CxK, solve.ld_CxK
  rhs = lw.astype(jnp.float32) * w_K[None, :]
  rhs = jnp.sum(rhs + ld.astype(jnp.float32) * r_K[None, :], axis=1)
  if solve.T_CxC is None:
    return rhs
  return jnp.sum(solve.T_CxC.astype(jnp.float32) * rhs[None, :], axis=1)


def output(cfg, dots, W, D, q_CxK, k_CxK, decay, G_CxC, Z_CxK):
  """`mem` read by each token's query; G and Z are of the token read."""
  if cfg.read == 'token':
    out = dots.nt(q_CxK, W) + dots.nt(decay.g[:, None] * q_CxK, D)
    out = out + dots.nn(G_CxC * dots.nt(q_CxK, k_CxK), Z_CxK)
  else:
    out = read(dots, q_CxK, W, D, decay.alive)
  return out + q_CxK if 'mem' in cfg.identity else out
