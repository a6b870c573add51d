"""The forward pass on a GPU: the walk, then `mem`, then the output."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from nestax.models.memory import gpu_carry, gpu_gates, gpu_tile, gpu_walk
from nestax.models.memory.gpu_layout import (
  Shape,
  apart,
  array,
  call,
  groups,
  lay,
  marks_of,
  over_group,
  put,
  put_tokens,
  query_of,
  scalars_of,
  together,
)

WARPS = 4
STAGES = 2


class Saved(NamedTuple):
  """What the backward pass takes from the forward pass."""

  walked: gpu_walk.Walked
  linked: gpu_carry.Linked
  D: jax.Array  # of `mem`, [B, H, n, K, K]
  Z: jax.Array  # of `mem`, [B, H, n, C, K]


def forward(shape: Shape, save: bool, given, stream):
  """Walks from the first chunk to the last.

  Returns:
    ((boundary or None, running, output `[B, n C, H, K]` float32), Saved or
    None). The boundary is wanted where `stream.filled` is given: the fast
    parts after that many chunks, untouched where it is none.
  """
  slow, fast = lay(shape, given), apart(shape, given.fast)
  walked, boundary, running = gpu_walk.walk(
    shape, save, slow, fast._replace(mem=None), stream
  )
  linked = gpu_carry.link(shape, save, slow, stream, walked)
  D, boundary_mem, running_mem = gpu_carry.carry(
    shape, False, linked, linked.G, fast.mem, stream.filled, None
  )
  out, Z = output(shape, save, slow, stream, walked, D)
  running = together(shape, running._replace(mem=running_mem))
  if boundary is not None:
    boundary = together(shape, boundary._replace(mem=boundary_mem))
  saved = Saved(walked, linked._replace(G=None), D, Z) if save else None
  return (boundary, running, out), saved


def output(shape: Shape, save: bool, slow, stream, walked, D):
  """(Output, what chunks write into `mem` if wanted), every chunk by itself."""
  B, _, H, K = stream.query.shape
  Z = array(shape, B, H)(shape.C, K) if save else None
  walked = walked._replace(D=None, D_gates=None, Z=None, Z_gates=None)
  return call(
    _output_kernel, shape, (groups(shape), H, B),
    (slow.maps['mem'], stream, walked, D),
    (jax.ShapeDtypeStruct(stream.query.shape, jnp.float32), Z),
    'memory_output', WARPS, STAGES,
  )  # fmt: skip


def _output_kernel(shape: Shape, W, stream, walked, D_ref, out, Z_ref):
  h = pl.program_id(1)
  W = W[h, :, :]  # read once: it stays in shared memory
  refs = stream, walked, D_ref, out, Z_ref
  over_group(shape, lambda at, _: _output_chunk(shape, W, refs, at))


def _output_chunk(shape: Shape, W, refs, at):
  cfg, dots = shape.cfg, shape.dots
  stream, walked, D_ref, out, Z_ref = refs
  b, h, i = at
  marks = marks_of(stream, at)
  gate, *_ = scalars_of(shape, walked.scalars, at)
  decay = gpu_gates.decays(gate, marks)
  D = D_ref[b, h, i]
  Z = None
  if Z_ref is not None or cfg.read == 'token':
    Z = _written(shape, W, D, walked, decay, at)
  if Z_ref is not None:
    put(Z_ref, at, Z)
  q, _ = query_of(shape, stream, at)
  if cfg.read == 'token':
    y = dots.nt(q, W) + dots.nt(decay.g[:, None] * q, D)
    qk = dots.nt(q, walked.k[b, h, i])
    y = y + dots.nn(gpu_gates.within(dots, gate, marks) * qk, Z)
  else:
    y = gpu_tile.read(dots, q, W, D, decay.alive)
  put_tokens(shape, out, at, y + q if 'mem' in cfg.identity else y)


def _written(shape: Shape, W_KxK, D_KxK, walked, decay, at):
  """What the chunk's tokens write into `mem`, `[C, K]`."""
  cfg, dots = shape.cfg, shape.dots
  b, h, i = at
  k, v = (x[b, h, i].astype(jnp.float32) for x in (walked.k, walked.v))
  side = gpu_tile.sides(cfg, dots, k, v, decay)
  rhs = gpu_tile.target(cfg, 'mem', k, v, decay.eta)
  if gpu_tile.has_point(cfg):
    rhs = rhs + dots.nt(side.lw, W_KxK)
  if gpu_tile.has_point(cfg) or cfg.delta:
    rhs = rhs + dots.nt(side.ld, D_KxK)
  Z = dots.nn(walked.T[b, h, i], rhs) if cfg.delta else rhs
  return Z.astype(shape.dtype)
