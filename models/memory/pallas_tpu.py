"""The memory's walk over chunks as Pallas kernels for TPUs.

One grid step is one chunk of a few heads of one sequence; the chunks of a
walk follow each other, and the fast parts stay in VMEM, in the blocks that
are written back when the walk is over. The backward kernel walks the chunks
in reverse, from what the forward one kept of each or, at a stride, of every
few (`tpu_segments`).
"""

import functools

import jax
import jax.numpy as jnp

from nestax.models.memory import (
  scan,
  tpu_backward,
  tpu_forward,
  tpu_vmem,
)
from nestax.models.memory.tile_front import State, handed
from nestax.models.memory.tpu_layout import (
  Given,
  Shape,
  Stream,
  as_rows,
  lay,
  marks,
  unlay,
)
from nestax.models.memory.types import GATES, MemoryConfig, Weights, named


class DoesNotFit(ValueError):
  """The kernels do not cover this rule or shape."""


def check(cfg: MemoryConfig, C: int, K: int, dtype, n: int | None = None):
  """Raises DoesNotFit, in words, for what the kernels do not cover.

  Args:
    cfg: the rule.
    C, K: tokens of a chunk, width of a head.
    dtype: of the matmuls' operands.
    n: chunks of a walk; None for as many as you like.
  """
  if C < 8 or C > 256 or C & (C - 1):
    raise DoesNotFit(f'a chunk of {C} tokens: a power of two from 8 to 256')
  if K > 256 or K & (K - 1):
    raise DoesNotFit(f'heads of width {K}: a power of two up to 256')
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    raise DoesNotFit(f'matmuls in {jnp.dtype(dtype)}: bfloat16 or float32')
  stride = min(cfg.stride, n or cfg.stride)
  heads = tpu_vmem.heads_a_step(cfg, C, 2 * tpu_vmem.LANES, K, dtype)
  wanted = tpu_vmem.wanted(cfg, C, K, dtype, heads)
  if wanted > tpu_vmem.SMALLEST:
    raise DoesNotFit(
      f'heads of width {K}, chunks of {C} tokens, {jnp.dtype(dtype)}, '
      f'two-layer memories {cfg.deep}, momentum={cfg.momentum}: '
      f'{wanted / 2**20:.1f} MiB of VMEM, more than '
      f'{tpu_vmem.SMALLEST / 2**20:.0f}'
    )
  one = tpu_vmem.chunk_bytes(cfg, C, K, dtype, heads)
  room = tpu_vmem.room(cfg, C, K, heads)
  if stride > 1 and stride * one > room:
    raise DoesNotFit(
      f'stride={cfg.stride}: {stride} chunks of {C} tokens, heads of width '
      f'{K}, want {stride * one / 2**20:.1f} MiB of VMEM to be walked back '
      f'in, and {max(0, room) / 2**20:.1f} MiB are for that: up to '
      f'{max(1, room // one)} are sure to fit'
    )


def check_rows(cfg: MemoryConfig, L: int, K: int, dtype):
  """`check` for rows of L tokens, wherever in a chunk the first one stands."""
  C = cfg.chunks[0]
  check(cfg, C, K, dtype, -(-(L + C - 1) // C))


def run(cfg, initial, state, inputs, dtype, length_B=None, aligned=False):
  """`scan.run` with the kernels in place of its scan.

  Raises:
    DoesNotFit: for a rule or shape that they do not cover.
  """
  _, L, _, K = inputs.query.shape
  check_rows(cfg, L, K, dtype)
  return scan.run(
    cfg, initial, state, inputs, dtype, length_B, aligned, walk=_walk
  )


def _walk(cfg, initial, slow, carry, xs, ends_nxB, dtype):
  """The walk that `scan.walk_chunks` describes."""
  n, B, H, C, K = xs.query_CxK.shape
  heads = tpu_vmem.heads_a_step(cfg, C, H, K, dtype)
  padded = -(-H // heads) * heads
  ahead = tpu_vmem.heads_ahead(cfg, C, H, K, dtype)
  shape = Shape(cfg, jnp.dtype(dtype).name, C, n, heads, ahead)

  def by_head(x, axis):
    width = [(0, 0)] * x.ndim
    width[axis] = (0, padded - H)
    return jnp.pad(x, width) if padded > H else x

  def over_stream(x):
    x = by_head(jnp.transpose(x, (1, 0, 3, 2, 4)), 3)
    return x.reshape(B, n * C, padded * K)

  def maps(weights, axis):
    if weights is None:
      return None
    laid = lay(cfg, weights.stack, K, weights.outer)
    return jax.tree.map(lambda x: by_head(x, axis), laid)

  laid = lay(cfg, slow.stack, K, slow.outer)
  # a gate that is handed in, or held at 1, has no kernel
  none = {'kernel': jnp.zeros((H, K)), 'bias': jnp.zeros((H,))}
  own = [initial.get(gate, none) for gate in GATES]
  laid = laid._replace(gates_8xK=as_rows([x['kernel'] for x in own]))
  bias = as_rows([x['bias'][:, None] for x in own])
  given = Given(
    jax.tree.map(lambda x: by_head(x, 0), laid),
    by_head(bias, 0),
    State(*(maps(weights, 1) for weights in carry)),
  )
  due = None
  if carry[0] is not None:
    due = jnp.stack([ends_nxB % size == 0 for size in
                     (cfg.chunk_rest, cfg.chunk_mem)], axis=-1)  # fmt: skip
    due = jnp.moveaxis(due, 0, 1)[..., None].astype(jnp.float32)
    due = jnp.broadcast_to(due, (B, n, 2, C))
  gates = {'beta': xs.log_beta_C, 'eta': xs.eta_C, 'alpha': xs.log_alpha_C}
  gates = [gates[name] for name in handed(cfg)]
  if gates:
    gates = jnp.stack(gates, axis=-2).astype(jnp.float32)
    gates = by_head(jnp.transpose(gates, (1, 2, 0, 3, 4)), 1)
  tokens, of_tokens = map(over_stream, xs[:3]), marks(xs.reset_C, xs.live_C)
  stream = Stream(*tokens, of_tokens, due, gates if handed(cfg) else None)
  state, out = _kernels(shape, given, stream)
  out = out.reshape(B, n, C, padded, K)[:, :, :, :H]

  def back(laid):
    if laid is None:
      return None
    laid = jax.tree.map(lambda x: x[:, :H], laid)
    outer = {box: laid.outer[box].mT for box in cfg.deep}
    return Weights(unlay(cfg, laid), outer)

  out = jnp.transpose(out, (1, 0, 3, 2, 4))
  return tuple(map(back, state)), out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernels(shape: Shape, given: Given, stream: Stream):
  """(State, output [B, n C, H K]) after the walk."""
  return _either(
    functools.partial(tpu_forward.forward, shape, False), given, stream
  )[0]


def _kernels_fwd(shape, given, stream):
  end, saved = named(
    _either(functools.partial(tpu_forward.forward, shape, True), given, stream)
  )
  return end, (given, stream, saved)


def _kernels_bwd(shape, residuals, gradients):
  given, stream, saved = residuals
  given, stream = _either(
    functools.partial(tpu_backward.backward, shape),
    given,
    stream,
    saved,
    gradients,
  )
  return given, stream


_kernels.defvjp(_kernels_fwd, _kernels_bwd)


def _either(function, *args):
  """Compiled for a TPU, interpreted anywhere else."""
  return jax.lax.platform_dependent(
    *args,
    tpu=functools.partial(function, False),
    default=functools.partial(function, True),
  )
