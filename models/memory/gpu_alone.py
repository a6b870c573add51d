"""A two-layer `mem` that is the only memory, on a GPU: Titans, TTT-MLP.

Keys, values and gates are those handed in, so that all products of gates are
known beforehand (`decay.decays`), and without `delta` there is no system to
solve. With `gpu_deep`'s letters, S the momenta, `last` and `last_b` what is
left of each token's step at the chunk's end in fast parts and momenta:

  U_A = -eta b / gain_A,   D_A = g_C D_A + c_C S_A + U_A^T (last k)
                           S_A = b_C S_A + U_A^T (last_b k)
  U_O = -eta e / gain_O,   D_O = g_C D_O + c_C S_O + U_O^T (last u)
                           S_O = b_C S_O + U_O^T (last_b u)

That has to be walked in order, and is, by kernels (`gpu_alone_walk`, and back
`gpu_alone_turn`). What goes in and what is read comes from no kernel.
"""

import functools

import jax
import jax.numpy as jnp

from nestax.models.memory import chunk as tokens_of_a_chunk
from nestax.models.memory import gpu_alone_step
from nestax.models.memory.decay import Chunk, decays
from nestax.models.memory.gpu_alone_tile import Both, Given, Left, Tokens
from nestax.models.memory.gpu_deep import Pair
from nestax.models.memory.gpu_layout import Shape
from nestax.models.memory.types import MemoryConfig, Weights, unit


def covers(cfg: MemoryConfig) -> bool:
  """Whether a two-layer `mem` is the only memory, and only added to."""
  alone = cfg.boxes == ('mem',) and not cfg.gates and not cfg.generated
  return bool(cfg.deep) and alone and not cfg.delta and cfg.objective == 'l2'


def walk(cfg, initial, slow: Weights, state, xs: Chunk, filled, dtype):
  """Walks chunks of which each starts at a boundary.

  Args:
    cfg: the rule, see `covers`.
    initial: slow values, leaves with a leading `[H]`.
    slow: `types.stack_initial` of them.
    state: (running, momentum or None), Weights `[B, H, ...]` float32.
    xs: inputs, `[n, B, H, C, ...]`.
    filled: chunks that the tokens fill, `[B, 1]` int32, or None.
    dtype: of the matmuls' operands.

  Returns:
    (boundary, running, momentum, output `[n, B, H, C, K]` float32), the
    boundary, after `filled` chunks, None where that is.
  """
  n, *_, C, K = xs.query_CxK.shape
  shape = Shape(cfg, jnp.dtype(dtype).name, C, n, K, False)
  xs = Chunk(*(x if x is None else _by_sequences(x) for x in xs))
  start = Both(*(w and _pair(w) for w in state))
  slow = _pair(slow)

  tokens = _over_heads(functools.partial(_tokens, cfg), initial, xs)
  alive = None
  if xs.reset_C is not None:
    alive = jnp.cumsum(xs.reset_C.astype(jnp.int32), axis=-1) == 0
    alive = alive.astype(jnp.int32)
  given = Given(slow, start, tokens, alive, filled)
  left, boundary, end = gpu_alone_step.through(shape, given)
  read = functools.partial(_read, cfg, dtype)
  if cfg.remat:
    read = jax.checkpoint(read)
  out = _over_heads(read, (initial, slow), xs, tokens.k, left)
  running, momentum = (pair and _weights(pair) for pair in end)
  out = jnp.moveaxis(out, 2, 0)
  return boundary and _weights(boundary), running, momentum, out


def _by_sequences(x):
  """`[n, B, (H), C, ...]` to `[B, (H), n, C, ...]`."""
  return jnp.moveaxis(x, 0, 2 if x.ndim > 3 else 1)


def _pair(weights: Weights) -> Pair:
  """`mem` is all there is."""
  return Pair(weights.stack, weights.outer['mem'])


def _weights(pair: Pair) -> Weights:
  return Weights(pair.inner, {'mem': pair.outer})


def _over_heads(function, of_head, xs: Chunk, *more):
  """`function(of_head, xs, *more)` of every chunk, `[B, H, n, ...]`."""
  per_head = Chunk(0, 0, 0, 0, None, None, 0, 0)
  rest = (0,) * len(more)
  chunks = jax.vmap(function, (None, 0, *rest))
  heads = jax.vmap(chunks, (0, per_head, *rest))
  return jax.vmap(heads, (None, 0, *rest))(of_head, xs, *more)


def _project(cfg, initial, xs: Chunk):
  """q, k, v, eta and log alpha: no memory is read for them."""
  return tokens_of_a_chunk.project(
    cfg, initial, None, None, None, xs, jnp.float32
  )


def _tokens(cfg, initial, xs: Chunk) -> Tokens:
  _, k, v, eta, log_alpha = _project(cfg, initial, xs)
  decay = decays(cfg, log_alpha, xs)
  if not cfg.momentum:
    last = decay.G_CxC[-1]
    return Tokens(k, v, eta, last, None, decay.g_C[-1], None, None)
  return Tokens(
    k, v, eta, decay.A_CxC[-1], decay.B_last_C,
    decay.g_C[-1], decay.c_C[-1], decay.b_last,
  )  # fmt: skip


def _read(cfg, dtype, of_head, xs: Chunk, k, left: Left):
  """What a chunk's queries read from `mem`, `[C, K]` float32."""
  initial, slow = of_head
  fast, momentum = left.start
  q, _, _, _, log_alpha = _project(cfg, initial, xs)
  if cfg.read == 'boundary':
    alive = None
    if xs.reset_C is not None:
      alive = jnp.cumsum(xs.reset_C.astype(jnp.int32)) == 0
    return tokens_of_a_chunk.recall(
      cfg, _weights(slow), _weights(fast), alive, xs.query_CxK, dtype
    )
  decay = decays(cfg, log_alpha, xs)

  def layer(W, D, S, keys, U, x):
    U, Z = (U, jnp.zeros_like(U)) if cfg.momentum else (None, U)
    written = tokens_of_a_chunk.Written(W, D, S, keys, U, Z)
    return tokens_of_a_chunk.read_running(cfg, written, decay, x, dtype)

  momentum = momentum or Pair(None, None)
  out = layer(slow.inner, fast.inner, momentum.inner, k, left.U_inner, q)
  u = unit(jax.nn.gelu(left.r.astype(q.dtype)))
  out = layer(
    slow.outer, fast.outer, momentum.outer, u, left.U_outer, jax.nn.gelu(out)
  )
  return out + q if 'mem' in cfg.identity else out
