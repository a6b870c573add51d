"""The walk of a two-layer `mem` alone on a GPU, and its derivative.

What the walk back leaves for later are sums over each chunk by itself.
"""

import functools

import jax
import jax.numpy as jnp

from nestax.models.memory import gpu_alone_turn, gpu_alone_walk
from nestax.models.memory.gpu_alone_tile import Given, Left, Tokens
from nestax.models.memory.gpu_deep import EPS, Pair
from nestax.models.memory.gpu_layout import Shape
from nestax.models.memory.solve import dot


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def through(shape: Shape, given: Given):
  """(Left, boundary or None, Both at the end), see `gpu_alone_walk.walk`."""
  return _forward(shape, given)[0]


def _narrow(shape: Shape, given: Given) -> Given:
  """As the kernels read it: matmuls' operands in their dtype."""
  k, v = (x.astype(shape.dtype) for x in given.tokens[:2])
  slow = jax.tree.map(lambda w: w.astype(shape.dtype), given.slow)
  return given._replace(slow=slow, tokens=given.tokens._replace(k=k, v=v))


def _forward(shape: Shape, given: Given):
  given = _narrow(shape, given)
  left, saved, boundary, end = _either(shape, gpu_alone_walk.walk, given)
  return (left, boundary, end), (given, left, saved)


def _bwd(shape, residuals, gradients):
  given, left, saved = residuals
  d_left, d_boundary, d_end = gradients
  turned, d_start = _either(
    shape, gpu_alone_turn.turn, given, left, saved, d_left, d_end, d_boundary
  )
  d_slow, d_tokens = _sums(shape, given, left, saved, turned)
  return (Given(d_slow, d_start, d_tokens, None, None),)


# not `named`: what chunks begin with is large, and found again in a walk
through.defvjp(_forward, _bwd)


def _sums(shape: Shape, given: Given, left: Left, saved, turned):
  """Gradients of slow values and tokens, float32."""
  (k, _, _, last, last_b, *_), dtype = given.tokens, jnp.dtype(shape.dtype)
  times = functools.partial(dot, dtype=dtype)
  h = jax.nn.gelu(left.r.astype(jnp.float32))
  u = h * jax.lax.rsqrt(saved.norms[..., 0, :] + EPS)[..., None]

  def by_steps(weights, d: Pair):
    """(Of keys, of the weights), by what steps are written with."""
    d_k = times(left.U_inner, d.inner)
    d_u = times(left.U_outer, d.outer)
    return weights[..., None] * d_k, _along(d_k, k) + _along(d_u, u)

  E, F = turned.end
  D, S = left.start
  d_k, d_last = by_steps(last, E)
  d_kept, d_last_b, d_c, d_b = _product(D, E), None, None, None
  if F is not None:
    more, d_last_b = by_steps(last_b, F)
    d_k, d_c, d_b = d_k + more, _product(S, E), _product(S, F)
  d_e = turned.e.astype(jnp.float32)
  if 'mem' in shape.cfg.identity:
    d_k = d_k + d_e
  by_fast = times(turned.r, D.inner)
  if given.alive is not None:
    by_fast = by_fast * given.alive[:, None, ..., None]
  rows = _rows(turned.r)
  by_slow = times(rows, given.slow.inner)
  d_k = d_k + by_fast + _like(by_slow, k)
  outer = times(_turned(_rows(saved.e)), _rows(turned.m))
  d_slow = Pair(
    times(_turned(rows), _rows(k)),
    outer + times(_turned(_rows(turned.e)), _rows(h)),
  )
  return d_slow, Tokens(
    d_k, -d_e, turned.eta[..., 0, :], d_last, d_last_b, d_kept, d_c, d_b
  )


def _along(x, y):
  """Of tokens' rows."""
  return jnp.sum(x * y.astype(jnp.float32), axis=-1)


def _product(x: Pair, y: Pair):
  """Of all weights of a head."""
  return sum(
    jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=(-1, -2))
    for a, b in zip(x, y)
  )


def _rows(x):
  """`[B, H, n, C, ...]` to `[H, tokens, ...]`."""
  x = jnp.moveaxis(x, 1, 0)
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _like(rows, x):
  """Back from `_rows`, to the shape of x."""
  B, H, *rest = x.shape
  return jnp.moveaxis(rows.reshape(H, B, *rest), 0, 1)


def _turned(x):
  return jnp.swapaxes(x, -1, -2)


def _either(shape: Shape, function, *arrays):
  """Compiled for CUDA, interpreted anywhere else."""
  return jax.lax.platform_dependent(
    *arrays,
    cuda=functools.partial(function, shape),
    default=functools.partial(function, shape._replace(interpret=True)),
  )
