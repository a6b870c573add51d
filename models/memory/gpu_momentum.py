"""Momentum in a chunk on a GPU's tiles: its gate's products, and both's.

With `B[s, i]` the momentum gate's product over (i, s] and G that of the forget
gate, what token i adds to the momentum is in the running memory after t with
the weight `A[t, i] = (G B)[t, i]`, and in the one before with `A_p = G_p B`.
So a chunk, of whose keys k, points p and system T `gpu_tile` speaks, writes

  U = W lw^T + D lw^T - target (eta .)^T
  D_C = g D + c S + D ld^T Kt + S ls^T Kt + U ku      S_C = b S + U kb
  ld = -eta g_p k,   ls = -eta c_p k,   P = eta A_p (k k^T),
  Kt = T^T last_k,   ku = A_C k - P^T Kt,   kb = B_C k

where b, c, c_p are the weights of the momentum at the boundary. All is linear
in D and S, by the same matrices for all memories.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import gpu_gates, gpu_tile
from nestax.models.memory.gpu_gates import Decays, Gates, Marks
from nestax.models.memory.gpu_layout import (
  SCALARS,
  Shape,
  end_of,
  marks_of,
  scalars_of,
)

MORE = ('c_p', 'last_A')  # rows of scalars, after those of `gpu_layout`


class Push(NamedTuple):
  """Weights of momenta, `[C]` float32 and two scalars."""

  b: jax.Array  # of the boundary's, in each token's momentum
  c: jax.Array  # in the running memory
  c_p: jax.Array  # in the one before
  last_A: jax.Array  # of each token's, in the memory at the chunk's end
  last_b: jax.Array  # in the momentum at the chunk's end
  alpha: jax.Array
  live: jax.Array | None  # 1 where a token counts
  c_end: jax.Array
  b_end: jax.Array


class Here(NamedTuple):
  """A chunk as the walk has left it."""

  gate: Gates
  decay: Decays
  push: Push
  marks: Marks
  total_b: jax.Array  # [C]
  k: jax.Array  # [C, K] in the matmuls' dtype
  v: jax.Array


class Sides(NamedTuple):
  """Left-hand sides, `[C, K]` in the matmuls' dtype."""

  lw: jax.Array
  alive_lw: jax.Array  # of tokens that read the fast parts
  ld: jax.Array
  ls: jax.Array
  last_k: jax.Array
  last_Ak: jax.Array  # A_C k
  kb: jax.Array


def _live(marks: Marks):
  return None if marks.live is None else (marks.live != 0).astype(jnp.float32)


def pushes(dots, total_b, marks: Marks):
  """`B[t, i]`, by which token i's step is in the momentum after t."""
  return gpu_gates.inside(dots, total_b, total_b, marks, strict=False)


def before(dots, gate: Gates, marks: Marks):
  """`G_p[t, s]`, for tokens s that count."""
  G_p = gpu_gates.inside(dots, gate.before, gate.total, marks, strict=True)
  live = _live(marks)
  return G_p if live is None else G_p * live[None, :]


def _boundary_b(total_b, decay: Decays):
  b = jnp.exp(total_b)
  return b if decay.alive is None else b * decay.alive


def last_live(decay: Decays, marks: Marks):
  """`G_C[s]`, for tokens s that count."""
  live = _live(marks)
  return decay.last if live is None else decay.last * live


def built(dots, gate: Gates, decay: Decays, total_b, marks: Marks):
  """(G_p, A_p, both `[C, C]`; c_p and last_A, `[C]`)."""
  B, G_p = pushes(dots, total_b, marks), before(dots, gate, marks)
  c_p = jnp.sum(G_p * _boundary_b(total_b, decay)[None, :], axis=1)
  last_A = jnp.sum(last_live(decay, marks)[:, None] * B, axis=0)
  return G_p, dots.nn(G_p, B), c_p, last_A


def _last_b(total_b, end, marks: Marks):
  last_b = jnp.exp(end - total_b)
  if marks.document is None:
    return last_b
  return jnp.where(marks.document == jnp.max(marks.document), last_b, 0.0)


def key_b(shape: Shape, k, stream, at):
  """Keys as the momentum at the chunk's end takes steps."""
  b, h, i = at
  total_b, end = (
    stream.total_b[b, h, i, x] for x in (slice(None), shape.C - 1)
  )
  return _last_b(total_b, end, marks_of(stream, at))[:, None] * k


def push(gate, decay, total_b, c_p, last_A, marks: Marks, ends) -> Push:
  """`ends`: of total_b, and weights of the boundary's momentum c and b."""
  b, live = _boundary_b(total_b, decay), _live(marks)
  alpha = jnp.exp(gate.total - gate.before)
  c = alpha * c_p + (b if live is None else live * b)
  end, *ends = ends
  last_b = _last_b(total_b, end, marks)
  return Push(b, c, c_p, last_A, last_b, alpha, live, *ends)


def _ends(shape: Shape, stream, scalars, at):
  """See `push`."""
  (b, h, i), last = at, shape.C - 1
  end = stream.total_b[b, h, i, last]
  total, before = (
    end_of(shape, scalars, at, name) for name in ('total', 'before')
  )
  b_end = jnp.exp(end)
  if stream.document is not None:
    b_end = jnp.where(stream.document[b, i, last] == 0, b_end, 0.0)
  new = b_end
  if stream.live is not None:
    new = jnp.where(stream.live[b, i, last] != 0, b_end, 0.0)
  c_p = scalars[b, h, i, len(SCALARS) + MORE.index('c_p'), last]
  return end, jnp.exp(total - before) * c_p + new, b_end


def here(shape: Shape, stream, walked, at) -> Here:
  """Chunk `at` again."""
  b, h, i = at
  marks = marks_of(stream, at)
  gate, *_ = scalars_of(shape, walked.scalars, at)
  end = end_of(shape, walked.scalars, at, 'total')
  decay = gpu_gates.decays(gate, marks, end)
  total_b = stream.total_b[b, h, i, :]
  more = (
    walked.scalars[b, h, i, len(SCALARS) + j, :] for j in range(len(MORE))
  )
  ends = _ends(shape, stream, walked.scalars, at)
  pushed = push(gate, decay, total_b, *more, marks, ends)
  k, v = walked.k[b, h, i], walked.v[b, h, i]
  return Here(gate, decay, pushed, marks, total_b, k, v)


def running_A(dots, chunk: Here, A_p):
  """`A[t, i]`, to the running memory after t."""
  B = pushes(dots, chunk.total_b, chunk.marks)
  live = chunk.push.live
  B = B if live is None else live[:, None] * B
  return chunk.push.alpha[:, None] * A_p.astype(jnp.float32) + B


def sides(cfg, dots, k, v, decay: Decays, push: Push) -> Sides:
  """Everything that multiplies a memory or a momentum from the right."""
  eta = decay.eta[:, None]
  lw = -eta * gpu_tile.point(cfg, k, v)
  wide = (
    lw,
    lw if decay.alive is None else lw * decay.alive[:, None],
    -decay.eta_g[:, None] * k,
    -(decay.eta * push.c_p)[:, None] * k,
    decay.last[:, None] * k,
    push.last_A[:, None] * k,
    push.last_b[:, None] * k,
  )
  return Sides(*(x.astype(dots.dtype) for x in wide))


def sides_of(shape: Shape, chunk: Here) -> Sides:
  k, v = chunk.k.astype(jnp.float32), chunk.v.astype(jnp.float32)
  return sides(shape.cfg, shape.dots, k, v, chunk.decay, chunk.push)
