"""The memory's walk over chunks as Pallas (Triton) kernels for GPUs.

Only what a chunk's keys, values and gates are read from has to be walked in
order, and only that is: forward in `gpu_walk`, its gradients back in
`gpu_turn`. Whatever depends on it is found for all chunks at once
(`gpu_forward`, `gpu_parts`, `gpu_collect`), but for the fast part of `mem`,
whose recurrence is linear once they are known (`gpu_carry`). Of a long stream
these are the chunks of a piece, where that takes less memory (`gpu_pieces`).
"""

import functools

import jax
import jax.numpy as jnp

from nestax.models.memory import (
  gpu_alone,
  gpu_backward,
  gpu_deep_pass,
  gpu_forward,
  gpu_momentum_pass,
  gpu_pieces,
  gpu_tile,
  scan,
)
from nestax.models.memory.decay import log_rate
from nestax.models.memory.gpu_layout import Given, Shape, Stream
from nestax.models.memory.gpu_triton import LACKS, triton
from nestax.models.memory.types import GATES, MemoryConfig, Weights, named, wide

SIZES = (16, 32, 64)  # of chunks and heads
WIDE = 128  # heads that fit with the longest chunks in the narrowest numbers
WIDEST = 256  # hidden units of a two-layer `mem`
TRIED = ('9.0',)  # compute capabilities


class DoesNotFit(ValueError):
  """The kernels do not cover this rule or shape."""


def check(cfg: MemoryConfig, C: int, K: int, dtype):
  """Raises DoesNotFit, in words, for what the kernels do not cover."""
  if triton is None:
    raise DoesNotFit(LACKS)
  small, big = cfg.chunks
  if cfg.deep:
    _check_deep(cfg, K)
  carried = [box for box in cfg.boxes if box != 'mem']
  if cfg.momentum and not all(gpu_tile.at_point(cfg, box) for box in carried):
    raise DoesNotFit(
      f'momentum=True, identity={cfg.identity}, objective={cfg.objective!r}, '
      f"generated={cfg.generated}: only 'l2', generated values and identity "
      f'in all of {carried}'
    )
  if cfg.anchor != 'initial':
    raise DoesNotFit(f"anchor={cfg.anchor!r}: only 'initial'")
  if 'q' in cfg.adaptive:
    raise DoesNotFit(f"adaptive={cfg.adaptive}: only without 'q'")
  if small != big:
    raise DoesNotFit(f'chunks of {small} and {big} tokens: only equal ones')
  if C not in SIZES:
    raise DoesNotFit(f'a chunk of {C} tokens: one of {SIZES}')
  if K not in (*SIZES, WIDE):
    raise DoesNotFit(f'heads of width {K}: one of {(*SIZES, WIDE)}')
  fits = C == SIZES[-1] and jnp.dtype(dtype) == jnp.bfloat16
  if K == WIDE and (cfg.momentum or not fits):
    raise DoesNotFit(
      f'heads of width {K}, chunks of {C} tokens, {jnp.dtype(dtype)}, '
      f'momentum={cfg.momentum}: such heads only with chunks of {SIZES[-1]}, '
      'bfloat16 and without momentum'
    )
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    raise DoesNotFit(f'matmuls in {jnp.dtype(dtype)}: bfloat16 or float32')


def _check_deep(cfg: MemoryConfig, K: int):
  """The same of two-layer memories."""
  if cfg.deep != ('mem',):
    raise DoesNotFit(f'two-layer memories {cfg.deep}: only `mem`')
  if K not in SIZES:
    raise DoesNotFit(f'a two-layer `mem`, heads of width {K}: one of {SIZES}')
  F = K * cfg.expansion
  if F & (F - 1) or F > WIDEST:
    raise DoesNotFit(
      f'a two-layer `mem` of {F} hidden units: powers of two to {WIDEST}'
    )
  if gpu_alone.covers(cfg):
    return
  if cfg.momentum:
    raise DoesNotFit('a two-layer `mem`, momentum=True: only without')
  if not (cfg.generated and cfg.delta and cfg.bounded):
    raise DoesNotFit(
      f'a two-layer `mem`, generated={cfg.generated}, delta={cfg.delta}, '
      f'bounded={cfg.bounded}: only all of them'
    )
  if cfg.given or not cfg.key_norm:
    raise DoesNotFit(
      f'a two-layer `mem`, given={cfg.given}, key_norm={cfg.key_norm}: only '
      'gates of its own and unit keys'
    )
  if cfg.objective != 'l2' or cfg.read != 'token':
    raise DoesNotFit(
      f'a two-layer `mem`, objective={cfg.objective!r}, read={cfg.read!r}: '
      "only 'l2' and 'token'"
    )


def capability() -> str | None:
  """The GPU's compute capability; None where there is no such thing."""
  return getattr(jax.devices()[0], 'compute_capability', None)


def check_tried(cfg: MemoryConfig, L: int):
  """Raises DoesNotFit for what is not taken unless it is asked for.

  Kernels ask for up to 227 KiB of a block's shared memory, which many GPUs
  have not; those of a two-layer `mem` beside other memories keep over twice
  what `scan` keeps, but of L tokens that are several pieces, with a `stride`,
  less than it does without one. Alone it keeps up to twice as much.
  """
  pieces = cfg.stride > 1 and L >= 4 * gpu_pieces.SHORT * cfg.step
  if cfg.deep and not pieces and not gpu_alone.covers(cfg):
    raise DoesNotFit(
      'a two-layer `mem`: four times as fast, but takes more memory; '
      "implementation='pallas' asks for the kernels, as do, of long streams, "
      'strides of more than 1'
    )
  if capability() not in TRIED:
    raise DoesNotFit(
      f'a GPU of compute capability {capability()!r}: tried on {TRIED} only'
    )


def run(cfg, initial, state, inputs, dtype, length_B=None, aligned=False):
  """`scan.run` with the kernels in place of its scan.

  A stream that may stand inside a chunk reads its first chunk by `scan`: from
  the next boundary on, the boundary's fast parts are the running ones. So are
  those of an aligned state, whose boundary gets no gradient of its own.

  Raises:
    DoesNotFit: for a rule or shape that they do not cover.
  """
  check(cfg, cfg.chunks[0], inputs.query.shape[-1], dtype)
  walk = _walk if state is None or aligned else _walk_from_inside
  return scan.run(
    cfg, initial, state, inputs, dtype, length_B, aligned, walk=walk
  )


def _walk_from_inside(cfg, initial, slow, carry, xs, ends_nxB, dtype):
  def part(chunks):
    return jax.tree.map(lambda x: x[chunks], (xs, ends_nxB))

  first, rest = slice(0, 1), slice(1, None)
  carry, out = scan.walk_chunks(cfg, initial, slow, carry, *part(first), dtype)
  if ends_nxB.shape[0] == 1:
    return carry, out
  carry, more = _walk(cfg, initial, slow, carry, *part(rest), dtype)
  return carry, jnp.concatenate([out, more])


def _walk(cfg, initial, slow, carry, xs, ends_nxB, dtype):
  """The walk that `scan.walk_chunks` describes, from a boundary on."""
  return gpu_pieces.walk(_whole, cfg, dtype, initial, slow, carry, xs, ends_nxB)


def _whole(cfg, initial, slow, carry, xs, ends_nxB, dtype):
  n, C = ends_nxB.shape[0], xs.query_CxK.shape[-2]
  boundary, *state = carry
  filled = None
  if boundary is not None:
    filled = jnp.sum(ends_nxB % C == 0, axis=0, dtype=jnp.int32)[:, None]
  over = gpu_alone.walk if gpu_alone.covers(cfg) else _walk_all
  end, running, momentum, out = over(
    cfg, initial, slow, state, xs, filled, dtype
  )
  if boundary is not None:
    # where no chunk is filled, the boundary is the one given
    some = (filled > 0)[:, :, None, None]
    keep = lambda new, old: jnp.where(some, new, old)  # noqa: E731
    boundary = jax.tree.map(keep, end, boundary)
    document, _ = _marks(xs.reset_C, None)
    if document is not None:
      # a document that begins in the chunk that is not filled forgets it
      begun_Bxn = document[:, :, -1]
      begun_Bx1 = jnp.take_along_axis(begun_Bxn, filled, axis=1, mode='clip')
      forgets = (begun_Bx1 > 0) & (filled < n)
      boundary = jax.tree.map(
        lambda w: jnp.where(forgets[:, :, None, None], 0.0, w), boundary
      )
  return (boundary, running, momentum), out


def _walk_all(cfg, initial, slow, state, xs, filled, dtype):
  """The same of any memories: see `gpu_alone.walk`."""
  n, B, H, C, K = xs.query_CxK.shape
  shape = Shape(cfg, jnp.dtype(dtype).name, C, n, K, False)
  running, momentum = state

  def over_stream(x):
    return jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(B, n * C, H, K)

  scalars = [
    jnp.cumsum(xs.log_beta_C, axis=-1) if cfg.momentum else None,
    None if xs.eta_C is None else log_rate(xs.eta_C),
    xs.log_alpha_C,
  ]
  scalars = (  # from `[n, B, H, C]`
    None if x is None else jnp.transpose(wide(x), (1, 2, 0, 3)) for x in scalars
  )
  stream = Stream(
    *map(over_stream, xs[:3]), *_marks(xs.reset_C, xs.live_C), filled, *scalars
  )
  deep = bool(cfg.deep)
  given = Given(
    slow if deep else slow.stack,
    *_own_gates(shape, initial),
    running if deep else running.stack,
    momentum.stack if cfg.momentum else None,
  )
  end, running, *pushed, out = _kernels(shape, given, stream)
  out = jnp.transpose(out.reshape(B, n, C, H, K), (1, 0, 3, 2, 4))
  momentum = Weights(*pushed, {}) if cfg.momentum else None
  end = None if filled is None else as_weights(end)
  return end, as_weights(running), momentum, out


def _own_gates(shape: Shape, initial):
  """(Rows, biases) of `Given`."""
  own = shape.own_gates
  if not own:
    return None, None
  nothing = jax.tree.map(jnp.zeros_like, initial[own[0]])
  gates = [initial[gate] if gate in own else nothing for gate in GATES]
  rows = jnp.stack([gate['kernel'] for gate in gates], axis=-2)
  return rows, jnp.stack([gate['bias'] for gate in gates], axis=-1)


def as_weights(stack) -> Weights:
  """Of kernels for matrix memories, which give the stack alone."""
  return stack if isinstance(stack, Weights) else Weights(stack, {})


def _marks(reset_nxBxC, live_nxBxC):
  """(documents begun so far, live) as `[B, n, C]` int32, or None."""
  document = live = None
  if reset_nxBxC is not None:
    document = jnp.cumsum(reset_nxBxC.astype(jnp.int32), axis=-1)
    document = jnp.moveaxis(document, 0, 1)
  if live_nxBxC is not None:
    live = jnp.moveaxis(live_nxBxC.astype(jnp.int32), 0, 1)
  return document, live


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernels(shape: Shape, given: Given, stream: Stream):
  """(boundary or None, running, momentum if any, output) after the walk."""
  forward, _ = _passes(shape)
  return _either(shape, forward, (False,), given, stream)[0]


def _passes(shape: Shape):
  """(Forward, backward) of the rule."""
  if shape.cfg.deep:
    return gpu_deep_pass.forward, gpu_deep_pass.backward
  if shape.cfg.momentum:
    return gpu_momentum_pass.forward, gpu_momentum_pass.backward
  return gpu_forward.forward, gpu_backward.backward


def _kernels_fwd(shape, given, stream):
  forward, _ = _passes(shape)
  ends, saved = named(_either(shape, forward, (True,), given, stream))
  return ends, (given, stream, saved)


def _kernels_bwd(shape, residuals, gradients):
  given, stream, saved = residuals
  _, backward = _passes(shape)
  return _either(shape, backward, (), given, stream, saved, gradients)


_kernels.defvjp(_kernels_fwd, _kernels_bwd)


def _either(shape: Shape, function, static, *arrays):
  """Compiled for CUDA, interpreted anywhere else."""
  return jax.lax.platform_dependent(
    *arrays,
    cuda=functools.partial(function, shape, *static),
    default=functools.partial(
      function, shape._replace(interpret=True), *static
    ),
  )
