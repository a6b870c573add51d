"""The walk back over the gradients of the fast parts, on a GPU.

One program is one head of one sequence. Only what depends on the gradients of
the fast parts after a chunk is computed here, in the terms that
`gpu_backward.prepare` made of the chunk; `d_x` is the gradient of x. Those of
a token's scalars are of logarithms: every product of gates is the exponential
of a difference of sums at two tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_gates, gpu_tile
from nestax.models.memory.gpu_layout import (
  Shape,
  anchored,
  array,
  call,
  lay,
  marks_of,
  no_offsets,
  pad_rows,
  put,
  scalars_of,
  tokens_of,
)
from nestax.models.memory.types import GATES

WARPS = 8
STAGES = 1


class Turned(NamedTuple):
  """What the walk back found, `[B, H, n, ...]`."""

  d_rhs: jax.Array  # of the right-hand sides, [N, C]
  d_key: jax.Array  # of keys before their norm, [C, K]
  d_value: jax.Array
  d_logits: jax.Array  # [2, C], float32


def turned_shapes(shape: Shape, B: int, H: int) -> Turned:
  make, C, K = array(shape, B, H), shape.C, shape.K
  return Turned(
    make(shape.N, C), make(C, K), make(C, K), make(2, C, dtype='float32')
  )


def turn(shape: Shape, given, stream, saved, prepared, d_boundary, d_running):
  """(Turned, gradients of the first chunk's fast parts `[B, H, R, K]`)."""
  B, H, R, K = given.fast.shape
  d_fast = jax.ShapeDtypeStruct((B, H, 2, shape.N, K), jnp.float32)
  d_ends = jax.tree.map(lambda x: pad_rows(shape, x), (d_boundary, d_running))
  turned, d_fast = call(
    _turn_kernel, shape, (B, H),
    (lay(shape, given), no_offsets(shape), stream[1:], saved, prepared, d_ends),
    (turned_shapes(shape, B, H), d_fast), 'memory_turn', WARPS, STAGES,
  )  # fmt: skip
  return turned, d_fast[:, :, 0, :R]


def _turn_kernel(shape: Shape, slow, zeros, stream, saved, prepared, d_ends,
                 turned, d_fast):  # fmt: skip
  b, h = pl.program_id(0), pl.program_id(1)
  d_boundary, d_running = d_ends
  filled = stream[-1]

  def add_boundary(stop, dD):
    """The boundary is the fast parts as they were after `filled` chunks."""
    if d_boundary is None:
      return dD
    add = lambda dD: dD + d_boundary[b, h, :, :]  # noqa: E731
    return jax.lax.cond(filled[b, 0] == stop, add, lambda x: x, dD)

  def chunk(back, dD):
    i = shape.n - 1 - back
    dD = add_boundary(i + 1, dD)
    refs = slow, stream, saved, prepared, turned, d_fast
    at = anchored(zeros, b, h, i)
    return _turn_chunk(shape, refs, at, dD)

  # between chunks this is where gradients of single memories are gathered
  for slot in range(2):
    d_fast[b, h, slot, :, :] = jnp.zeros((shape.N, shape.K), jnp.float32)
  shape.barrier()
  dD = jax.lax.fori_loop(0, shape.n, chunk, d_running[b, h, :, :])
  dD = add_boundary(0, dD)
  shape.barrier()
  d_fast[b, h, 0, :, :] = dD


def _system(shape: Shape, saved, prepared, at, gate, marks, decay, dD):
  """What reaches the keys through the new fast parts and the system.

  Returns:
    (d_k, of log last, of log (eta g_p), of log g of earlier keys).
  """
  dots = shape.dots
  b, h, i = at
  k = saved.k[b, h, i]
  d_last_k = dots.tn(saved.Z[b, h, i], dD)
  d_k = decay.last[:, None] * d_last_k
  wide_k = k.astype(jnp.float32)
  d_last = jnp.sum(d_k * wide_k, axis=1)
  if prepared.d_k is not None:
    d_k = d_k + prepared.d_k[b, h, i].astype(jnp.float32)
  if not shape.cfg.delta:
    zero = jnp.zeros_like(d_last)
    return d_k, d_last, zero, zero
  d_L = dots.nt(prepared.turned_k[b, h, i], d_last_k)
  if prepared.d_L is not None:
    d_L = d_L + prepared.d_L[b, h, i].astype(jnp.float32)
  d_kk = (-gpu_gates.coupling(gate, marks) * d_L).astype(shape.dtype)
  of_rows, of_columns = dots.nn(d_kk, k), dots.tn(d_kk, k)
  # sums over rows and columns of d_kk * (k k^T)
  d_enters = jnp.sum(of_rows * wide_k, axis=1)
  d_minus = jnp.sum(of_columns * wide_k, axis=1)
  return d_k + of_rows + of_columns, d_last, d_enters, d_minus


def _sides(shape: Shape, slow, saved, turned, at, decay, d_k):
  """Through the left-hand sides of `gpu_tile.sides`.

  The gradients of right-hand sides come from memory, where they can be read
  either way round.

  Returns:
    (d_k, d_v, of log eta, of log (eta g_p)).
  """
  cfg, dots = shape.cfg, shape.dots
  b, h, i = at
  eta, alive = decay.eta[:, None], decay.alive
  d_ld = dots.tn(turned.d_rhs[b, h, i], saved.D[b, h, i])
  d_at = dots.tn(turned.d_rhs[b, h, i], slow.folded[h, i & 1, :, :])
  d_at = d_at + (d_ld if alive is None else alive[:, None] * d_ld)
  d_at = -eta * d_at
  k, v = (x[b, h, i].astype(jnp.float32) for x in (saved.k, saved.v))
  d_enters = jnp.zeros_like(decay.eta)
  if cfg.delta:
    d_read = -decay.eta_g[:, None] * d_ld
    d_k, d_enters = d_k + d_read, jnp.sum(d_read * k, axis=1)
  d_eta = jnp.sum(d_at * gpu_tile.point(cfg, k, v), axis=1)
  d_v = jnp.zeros_like(v)
  if slow.of_value is not None:
    d_v = eta * dots.tn(turned.d_rhs[b, h, i], slow.of_value[i & 1, :, :])
    d_eta = d_eta + jnp.sum(d_v * v, axis=1)
  if slow.of_key is not None:
    of_key = -eta * dots.tn(turned.d_rhs[b, h, i], slow.of_key[i & 1, :, :])
    d_k, d_eta = d_k + of_key, d_eta + jnp.sum(of_key * k, axis=1)
  if cfg.objective == 'l2':
    d_k = d_k + d_at
  if cfg.generated:
    d_v = d_v - d_at
  return d_k, d_v, d_eta, d_enters


def _turn_chunk(shape: Shape, refs, at, dD):
  """From the gradients after chunk `at` to those before it."""
  cfg, dots = shape.cfg, shape.dots
  slow, stream, saved, prepared, turned, d_fast = refs
  b, h, i = at
  key, value, document, live, _ = stream
  marks = marks_of(document, live, at)
  gate, k_norm, v_norm = scalars_of(shape, saved, at)
  decay = gpu_gates.decays(gate, marks)
  narrow = dD.astype(shape.dtype)
  d_k, d_last, d_enters, d_minus = _system(
    shape, saved, prepared, at, gate, marks, decay, narrow
  )
  d_kept = dD * saved.D[b, h, i].astype(jnp.float32)
  d_kept = decay.kept * jnp.sum(jnp.sum(d_kept, axis=1))
  d_rhs = dots.nt(narrow, prepared.turned_k[b, h, i])
  if prepared.d_rhs is not None:
    d_rhs = d_rhs + dots.nt(slow.of_mem[i & 1, :, :], prepared.d_rhs[b, h, i])
  put(turned.d_rhs, at, d_rhs)
  before = decay.kept * dD + dots.nn(narrow, prepared.keep[b, h, i])
  shape.barrier()
  d_k, d_v, d_eta, more = _sides(shape, slow, saved, turned, at, decay, d_k)
  d_enters = d_enters + more

  # the gates: total and before are sums of log alpha, before leaves out itself
  end = jnp.sum(d_last) + d_kept
  last = gpu_gates.iota(d_last.shape, 0) == shape.C - 1
  d_sum = prepared.d_total[b, h, i, 0, :] - d_last - d_minus + d_enters
  d_sum = d_sum + jnp.where(last, end, 0.0)
  d_alpha = jnp.sum(d_sum) - jnp.cumsum(d_sum) + d_sum - d_enters
  d_logits = (
    gate.slope_eta * (d_eta + d_enters),
    gate.slope_alpha * d_alpha,
  )

  # the projections, whose memories' gradients go by way of memory
  k, v = (x[b, h, i].astype(jnp.float32) for x in (saved.k, saved.v))
  d_k = gpu_tile.unit_back(d_k, k, k_norm)
  d_v = d_v if v_norm is None else gpu_tile.unit_back(d_v, v, v_norm)
  for box, d_y, x, ref in (
    ('k', d_k, key, turned.d_key),
    ('v', d_v, value, turned.d_value),
  ):
    d_y = d_y.astype(shape.dtype)
    put(ref, at, d_y)
    if box in cfg.boxes:
      x = _seen(tokens_of(shape, x, at), decay.alive)
      d_fast[b, h, i & 1, shape.box(box), :] = dots.tn(d_y, x)
  d_mem = prepared.d_mem[b, h, i].astype(jnp.float32)
  d_fast[b, h, i & 1, shape.box('mem'), :] = d_mem
  seen = _seen(tokens_of(shape, key, at).astype(jnp.float32), decay.alive)
  for j, name in enumerate(GATES):
    turned.d_logits[b, h, i, j, :] = d_logits[j]
    if name in cfg.gates:
      d_row = jnp.sum(d_logits[j][:, None] * seen, axis=0)
      d_fast[b, h, i & 1, shape.gate(name), :] = d_row
  shape.barrier()
  return before + d_fast[b, h, i & 1, :, :]


def _seen(x, alive):
  """The tokens that read the fast parts."""
  return x if alive is None else alive[:, None] * x.astype(jnp.float32)
