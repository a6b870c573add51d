"""Gradients of a chunk of a two-layer `mem` on a GPU's tiles.

`d_x` is the gradient of x in `gpu_deep`'s equations; what is called `those`
are a slice of the hidden units.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import gpu_adjoint, gpu_deep, gpu_gates
from nestax.models.memory.gpu_deep import Pair, Written
from nestax.models.memory.gpu_layout import Shape, tokens_of

TOKENS = ('total', 'enters', 'eta')  # see `gpu_adjoint.Tokens`


class Turned(NamedTuple):
  """What the walk back found, `[B, H, n, ...]`."""

  E: jax.Array  # of the first layer after the chunk, [F, K]
  rhs_inner: jax.Array  # of the systems' right-hand sides, [C, F]
  rhs_outer: jax.Array  # [C, K]
  r: jax.Array  # [C, F]
  r_v: jax.Array  # [C, F]
  m: jax.Array  # [C, F]
  e: jax.Array  # [C, K]
  tokens: jax.Array  # of tokens' scalars, [TOKENS, C], float32


class Carried(NamedTuple):
  """What goes from kernel to kernel, a slice of the hidden units a program."""

  d: Pair  # gradients of the fast parts, float32
  Z: jax.Array  # of Z_O by the slice, [B, H, slices, C, K]
  e: jax.Array  # of e by the slice, [B, H, slices, C, K]
  u: jax.Array  # [B, H, C, F]
  rows: jax.Array  # [B, H, slices, ROWS, C], float32


# of a slice: of U_A times U_A; kept fast parts; u's by the end and the system;
# times u
ROWS = ('inner', 'kept', 'last', 'enters', 'u')


def row(shape: Shape, ref, at, name: str):
  return gpu_deep.over_slices(shape, ref, at, ROWS.index(name))


def keys(shape: Shape, written: Written, at, those):
  """(gelu at r, u, 1 / ||h||), of some hidden units."""
  (b, h, i), dots = at, shape.dots
  act = gpu_deep.gelu(dots, written.r[b, h, i, :, those].astype(jnp.float32))
  h2 = gpu_deep.norms_at(written.norms, at)[0]
  return act, *gpu_deep.unit_rows(dots, act.value, h2)


def gradient_of_outer(shape: Shape, written, read, partial, at):
  """Of the second layer's right-hand sides, `[C, K]`."""
  b, h, i = at
  d_Z = gpu_deep.over_slices(shape, partial, at) + read.Z_outer[b, h, i].astype(
    jnp.float32
  )
  return shape.dots.tn(written.T[b, h, i], d_Z)


class Gained(NamedTuple):
  """A chunk's gains and what reaches them, `[C]`."""

  gain: gpu_deep.Gains
  by_inner: jax.Array
  by_outer: jax.Array
  d_h2: jax.Array
  d_b2: jax.Array
  d_e2: jax.Array


def gained(shape, written, eta, by_inner, d_outer, at) -> Gained:
  """See `Gained`.

  Args:
    shape: of the walk.
    written: with references of the chunks' norms and e.
    eta: `[C]`.
    by_inner: sum over the units of b times the gradient of the first layer's
      steps or right-hand sides, `[C]`.
    d_outer: gradient of the second layer's, `[C, K]`.
    at: the chunk.
  """
  norms = gpu_deep.norms_at(written.norms, at)
  gain = gpu_deep.gains(shape, *norms)
  e = written.e[at].astype(jnp.float32)
  by_outer = jnp.sum(d_outer.astype(jnp.float32) * e, axis=1)
  through = (jnp.zeros_like(eta),) * 3
  if shape.cfg.bounded:
    through = _through_gains(gain, norms, eta, by_inner, by_outer)
  return Gained(gain, by_inner, by_outer, *through)


def d_below(eta, gained: Gained, d_rhs, below):
  d = -(eta / gained.gain.inner)[:, None] * d_rhs.astype(jnp.float32)
  return d + (2.0 * gained.d_b2)[:, None] * below


def back(shape: Shape, args, E_after: Pair, turned: Turned, at, those):
  """Gradients of the fast parts before the chunk."""
  stream, walked, written, read, d_out = args
  (b, h, i), dots = at, shape.dots
  chunk = gpu_deep.here(shape, stream, walked, at)
  decay = chunk.decay
  alive = functools.partial(gpu_adjoint.alive_only, decay)
  act, u, _ = keys(shape, written, at, those)
  r_v = written.r_v[b, h, i, :, those].astype(jnp.float32)
  p = act.value - gpu_deep.gelu(dots, r_v).value
  d_outer = gpu_deep.times(decay.eta_g, turned.rhs_outer[b, h, i])
  outer = decay.kept * E_after.outer
  of_out = decay.g[:, None] * tokens_of(shape, d_out, at)
  outer = outer + dots.tn(of_out, read.h_q[b, h, i, :, those])
  e, d_e = written.e[b, h, i], turned.e[b, h, i]
  outer = outer + dots.tn(alive(e), turned.m[b, h, i, :, those])
  outer = outer + dots.tn(alive(d_e), p) - dots.tn(d_outer, u)
  inner = decay.kept * E_after.inner
  inner = inner + dots.tn(read.r_q[b, h, i, :, those], read.q[b, h, i])
  d_rhs = turned.rhs_inner[b, h, i, :, those].astype(jnp.float32)
  d_r = alive(turned.r[b, h, i, :, those].astype(jnp.float32))
  inner = inner + dots.tn(d_r - decay.eta_g[:, None] * d_rhs, chunk.k)
  inner = inner + dots.tn(alive(turned.r_v[b, h, i, :, those]), chunk.v)
  return Pair(inner, outer)


def tokens(shape: Shape, decay, gained: Gained, rows, at):
  """What reaches the tokens' scalars but by the sums of `gpu_deep_parts`."""
  d_last, enters = (row(shape, rows, at, x) for x in ('last', 'enters'))
  total = enters - d_last + gpu_gates.at_end(shape.C, jnp.sum(d_last))
  total = total + decay.kept * row(shape, rows, at, 'kept')
  by_steps = gained.by_inner / gained.gain.inner
  by_steps = by_steps + gained.by_outer / gained.gain.outer
  return total, enters, -decay.eta * by_steps


def _through_gains(gain: gpu_deep.Gains, norms, eta, by_inner, by_outer):
  """Of the squared norms, 0 where gains are held at 1."""
  h2, _, e2 = norms
  d_h2 = jnp.where(h2 > 1.0, 0.5 * eta * by_outer / (gain.outer * h2), 0.0)
  d_ratio = eta * by_inner / (gain.inner * gain.inner)
  d_ratio = jnp.where(gain.ratio > 1.0, d_ratio, 0.0) / (e2 + gpu_deep.EPS)
  return d_h2, d_ratio, -gain.ratio * d_ratio
