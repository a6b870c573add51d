"""The fast part and momentum of `mem` from chunk to chunk on a GPU, and back.

As in `gpu_carry` the recurrence is linear once keys, values and gates are
known, here (with what `gpu_momentum` names)

  D_C = g D + D A_DD + c S + S A_SD + (W lw^T + target)^T ku
  S_C = b S + D A_DS                + (W lw^T + target)^T kb
  A_DD = lw^T ku + ld^T Kt,   A_DS = lw^T kb,   A_SD = ls^T Kt

and its gradients go back by the same matrices turned round.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_carry, gpu_momentum, gpu_tile
from nestax.models.memory.gpu_layout import Shape, array, call, put

WARPS = 4
STAGES = 2


class Linked(NamedTuple):
  """What takes fast parts and momenta over a chunk, `[B, H, n, ...]`."""

  A_DD: jax.Array  # [K, K]
  A_DS: jax.Array
  A_SD: jax.Array | None
  kept: tuple  # g, c and b at the chunk's end, [] float32
  # for the walk back over the other memories: what their gradients meet on
  # the way to the keys of the chunk's end: T times ld, ls, and `-P lw`
  X: tuple | None  # [C, K]


def link(shape: Shape, save: bool, slow, stream, walked):
  """(Linked, what each chunk adds to `mem` and its momentum, `[K, K]`)."""
  B, H = stream.query.shape[0], stream.query.shape[2]
  make, C, K, delta = array(shape, B, H), shape.C, shape.K, shape.cfg.delta
  X = (make(C, K),) * 3 if save and delta and not shape.free else None
  outs = Linked(
    make(K, K),
    make(K, K),
    make(K, K) if delta else None,
    (make(dtype='float32'),) * 3,
    X,
  )
  return call(
    _link_kernel, shape, (shape.n, H, B),
    (slow.maps['mem'], stream, walked._replace(start=None)),
    (outs, (make(K, K), make(K, K))), 'memory_momentum_link', WARPS, 1,
  )  # fmt: skip


def _link_kernel(shape: Shape, W, stream, walked, linked, adds):
  cfg, dots = shape.cfg, shape.dots
  i, h, b = (pl.program_id(axis) for axis in range(3))
  at = b, h, i
  chunk = gpu_momentum.here(shape, stream, walked, at)
  side = gpu_momentum.sides_of(shape, chunk)
  ku = walked.ku[b, h, i]
  A_DD = dots.tn(side.alive_lw, ku)
  if cfg.delta:
    turned_k = walked.turned_k[b, h, i]
    A_DD = A_DD + dots.tn(side.ld, turned_k)
    put(linked.A_SD, at, dots.tn(side.ls, turned_k))
  put(linked.A_DD, at, A_DD)
  put(linked.A_DS, at, dots.tn(side.alive_lw, side.kb))
  ends = chunk.decay.kept, chunk.push.c_end, chunk.push.b_end
  for ref, x in zip(linked.kept, ends):
    ref[b, h, i] = x
  k, v = chunk.k.astype(jnp.float32), chunk.v.astype(jnp.float32)
  write = dots.nt(side.lw, W[h, :, :])
  write = write + gpu_tile.target(cfg, 'mem', k, v, chunk.decay.eta)
  put(adds[0], at, dots.tn(write, ku))
  put(adds[1], at, dots.tn(write, side.kb))
  if linked.X is not None:
    T = walked.T[b, h, i]
    P = system_P(shape, chunk, walked.A_p[b, h, i])
    ld = side.ld
    if chunk.decay.alive is not None:
      # gradients by way of U are not summed with the others, see the turn
      ld = ld.astype(jnp.float32) - dots.nn(P, side.alive_lw)
    put(linked.X[0], at, dots.nn(T, ld))
    put(linked.X[1], at, dots.nn(T, side.ls))
    put(linked.X[2], at, -dots.nn(T, dots.nn(P, side.lw)))


def system_P(shape: Shape, chunk, A_p):
  """`eta A_p (k k^T)`, float32."""
  kk = shape.dots.nt(chunk.k, chunk.k)
  return chunk.decay.eta[:, None] * A_p.astype(jnp.float32) * kk


def carry(shape: Shape, back: bool, linked: Linked, adds, start, filled,
          change):  # fmt: skip
  """Walks the chunks, from the last to the first if `back`.

  Args:
    shape: of the walk.
    back: of gradients, whose additions are the ones given.
    linked: of the chunks.
    adds: what each chunk adds to both, `[B, H, n, K, K]`.
    start: fast part and momentum, `[B, H, K, K]` float32.
    filled: `[B, 1]`, or None.
    change: back: what the boundary's gradient adds after `filled` chunks.

  Returns:
    (where each chunk was reached, twice `[B, H, n, K, K]`; forward: the
    boundary's fast part after `filled` chunks, untouched where it is none, or
    None; the end of both).
  """
  B, H, K = *start[0].shape[:2], shape.K
  end = jax.ShapeDtypeStruct((B, H, K, K), jnp.float32)
  boundary = None if back or filled is None else end
  each = array(shape, B, H)(K, K)

  def kernel(shape, *refs):
    _carry_kernel(shape, back, *refs)

  return call(
    kernel, shape, (B, H),
    (linked._replace(X=None), adds, start, filled, change),
    ((each, each), boundary, (end, end)),
    'memory_momentum_carry_back' if back else 'memory_momentum_carry',
    WARPS, STAGES,
  )  # fmt: skip


def _carry_kernel(shape: Shape, back, linked, adds, start, filled, change,
                  each, boundary, end):  # fmt: skip
  b, h = pl.program_id(0), pl.program_id(1)
  dots = shape.dots

  after = functools.partial(gpu_carry.reached, (b, h), filled, change, boundary)

  def asked(step):
    """What a step needs besides matrices, asked for a step ahead."""
    step = jnp.minimum(step, shape.n - 1)
    i = shape.n - 1 - step if back else step
    scalars = tuple(ref[b, h, i] for ref in linked.kept)
    return scalars, tuple(ref[b, h, i] for ref in adds)

  def chunk(step, carried):
    (D, S), ((kept, c, b_end), added) = carried
    i = shape.n - 1 - step if back else step
    ahead = asked(step + 1)
    D = after(i + 1 if back else i, D)
    put(each[0], (b, h, i), D)
    put(each[1], (b, h, i), S)
    dot = dots.nt if back else dots.nn
    new_D = kept * D + dot(D, linked.A_DD[b, h, i])
    new_S = b_end * S
    across = dot(S if back else D, linked.A_DS[b, h, i])
    other = 0.0
    if linked.A_SD is not None:
      other = dot(D if back else S, linked.A_SD[b, h, i])
    if back:
      new_D, new_S = new_D + across, new_S + c * D + other
    else:
      new_D, new_S = new_D + c * S + other, new_S + across
    D, S = (
      x + add.astype(jnp.float32) for x, add in zip((new_D, new_S), added)
    )
    return (D, S), ahead

  start = tuple(ref[b, h, :, :] for ref in start)
  start = start, asked(0)
  (D, S), _ = jax.lax.fori_loop(0, shape.n, chunk, start)
  end[0][b, h, :, :] = after(0 if back else shape.n, D)
  end[1][b, h, :, :] = S
