"""The output with momentum on a GPU.

Every chunk by itself, in the terms of `gpu_momentum`:

  R = D ld^T + S ls^T - U P^T,   Z = R T^T
  o = q W^T + g q D^T + c q S^T + (A * q k^T) U^T + (G * q k^T) Z^T
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_gates, gpu_momentum, gpu_tile
from nestax.models.memory.gpu_layout import (
  Shape,
  array,
  call,
  put,
  put_tokens,
  query_of,
)
from nestax.models.memory.gpu_momentum_link import system_P

WARPS = 4


class Steps(NamedTuple):
  """What a chunk writes into `mem`, or gradients, `[B, H, n, C, K]`."""

  U: jax.Array
  Z: jax.Array | None  # of gradients: of the system's right-hand side


def steps_of(shape: Shape, B: int, H: int) -> Steps:
  tile = array(shape, B, H)(shape.C, shape.K)
  return Steps(tile, tile if shape.cfg.delta else None)


def output(shape: Shape, save: bool, slow, stream, walked, both):
  """(Output, Steps if wanted).

  Args:
    shape: of the walk.
    save: whether Steps are wanted.
    slow: slow values.
    stream: inputs.
    walked: of `gpu_momentum_walk`.
    both: fast part and momentum of `mem` at each chunk's start.
  """
  B, _, H, K = stream.query.shape
  return call(
    _output_kernel, shape, (H, B, shape.n),
    (slow.maps['mem'], stream, walked._replace(start=None), both),
    (jax.ShapeDtypeStruct(stream.query.shape, jnp.float32),
     steps_of(shape, B, H) if save else None),
    'memory_momentum_output', WARPS, 1,
  )  # fmt: skip


def _output_kernel(shape: Shape, W, stream, walked, both, out, saved):
  cfg, dots = shape.cfg, shape.dots
  h, b, i = (pl.program_id(axis) for axis in range(3))
  at = b, h, i
  W = W[h, :, :]
  chunk = gpu_momentum.here(shape, stream, walked, at)
  D, S = (ref[b, h, i] for ref in both)
  steps = None
  if saved is not None or cfg.read == 'token':
    steps = _written(shape, W, D, S, walked, chunk, at)
  if saved is not None:
    jax.tree.map(lambda ref, x: put(ref, at, x), saved, steps)
  q, _ = query_of(shape, stream, at)
  if cfg.read == 'token':
    y = dots.nt(q, W) + dots.nt(chunk.decay.g[:, None] * q, D)
    y = y + dots.nt(chunk.push.c[:, None] * q, S)
    qk = dots.nt(q, chunk.k)
    A = gpu_momentum.running_A(shape.dots, chunk, walked.A_p[b, h, i])
    y = y + dots.nn(A * qk, steps.U)
    if steps.Z is not None:
      G = gpu_gates.within(shape.dots, chunk.gate, chunk.marks)
      y = y + dots.nn(G * qk, steps.Z)
  else:
    y = gpu_tile.read(dots, q, W, D, chunk.decay.alive)
  put_tokens(shape, out, at, y + q if 'mem' in cfg.identity else y)


def _written(shape: Shape, W, D, S, walked, chunk, at) -> Steps:
  """Rows are tokens."""
  cfg, dots = shape.cfg, shape.dots
  b, h, i = at
  k, v = chunk.k.astype(jnp.float32), chunk.v.astype(jnp.float32)
  side = gpu_momentum.sides(cfg, dots, k, v, chunk.decay, chunk.push)
  U = dots.nt(side.lw, W) + dots.nt(side.alive_lw, D)
  U = U + gpu_tile.target(cfg, 'mem', k, v, chunk.decay.eta)
  U = U.astype(shape.dtype)
  if not cfg.delta:
    return Steps(U, None)
  P = system_P(shape, chunk, walked.A_p[b, h, i])
  R = dots.nt(side.ld, D) + dots.nt(side.ls, S) - dots.nn(P, U)
  return Steps(U, dots.nn(walked.T[b, h, i], R).astype(shape.dtype))
