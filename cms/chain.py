"""Levels read and composed: `y = M_k(... M_1(x))` or side by side (NL 7.1).

A level is a gated MLP, `M(x) = down(silu(gate x) * up x)`, behind a norm and
inside a residual. Its weights are slow ones that all sequences share, or slow
ones plus what each sequence has written on them.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nestax.cms import factors
from nestax.cms.factors import Tapped, hidden
from nestax.cms.level import Own, Theta, Writes

SAVED = 'level_products'  # what a policy of recomputation may keep
VARIANTS = ('sequential', 'nested', 'independent')


def read(theta: Theta, x_BxLxD, dtype):
  """One level with the weights of all (NL Eq. 70, one factor).

  Args:
    theta: slow weights, any float dtype.
    x_BxLxD: normalised input.
    dtype: of the matmuls' operands and of the result.
  """
  return _mlp(Theta(*(w.astype(dtype) for w in theta)), x_BxLxD.astype(dtype))


def _mlp(theta: Theta, x):
  """The gated MLP; `x` and weights have the same leading axes, or `x` alone."""
  gate, up, down = theta
  return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _added(theta: Theta, delta: Theta, dtype) -> Theta:
  added = [t[..., None, :, :] + d for t, d in zip(theta, delta)]
  return Theta(*(w.astype(dtype) for w in added))


def own(theta: Theta, delta: Theta | None, dtype) -> Own:
  """What sequences read with, `theta + delta`, summed in float32.

  `theta` has one axis less than `delta`, that of sequences before the matrix.
  Without a delta it is what they read with that have written nothing.
  """
  if delta is None:
    gate, up, down = (w.astype(dtype) for w in theta)
  else:
    gate, up, down = _added(theta, delta, dtype)
  return Own(jnp.stack([gate, up], axis=-2), down)


def read_fast(theta: Theta, delta, x_BxLxD, dtype, alive_BxL=None):
  """One level with each sequence's own weights, `theta + delta`.

  Args:
    theta: slow weights.
    delta: the same with a leading `[B]`; or `Tapped`, the sum of both, which
      says itself who is alive.
    x_BxLxD: normalised input.
    dtype: of the matmuls' operands and of the result.
    alive_BxL: False for tokens of a document that started inside this piece,
      for which nothing has been learned yet; None if there is none.
  """
  x = x_BxLxD.astype(dtype)
  if isinstance(delta, Tapped):
    return factors.read(delta, x)
  y_BxLxD = _mlp(_added(theta, delta, dtype), x)
  return _where_alive(theta, alive_BxL, y_BxLxD, x)


def read_writes(
  theta: Theta, writes: Writes, x_BxLxD, dtype, period: int, alive_BxL=None
):
  """One level over many of its periods at once, each with its own weights.

  Args:
    theta: slow weights.
    writes: of one block: `scale` a scalar, `own` with leading `[m, B]`.
    x_BxLxD: normalised input of fresh sequences; the last period may be a
      part of one.
    dtype: of the matmuls' operands and of the result.
    period: tokens.
    alive_BxL: see `alive`.
  """
  x_BxLxD = x_BxLxD.astype(dtype)
  B, L, D = x_BxLxD.shape
  if L <= period:  # nothing was written yet
    return read(theta, x_BxLxD, dtype)
  m = -(-L // period)
  cut = jnp.pad(x_BxLxD, ((0, 0), (0, m * period - L), (0, 0)))
  x_mxBxPxD = jnp.moveaxis(cut.reshape(B, m, period, D), 1, 0)
  gate, up, down = theta
  both = jnp.stack([gate, up], axis=-2)
  scale, (own_both, own_down) = writes
  h_mxBxPxF = hidden(_by_period(x_mxBxPxD, both, scale, own_both))
  y_mxBxPxD = _by_period(h_mxBxPxF, down, scale, own_down)
  y_BxLxD = jnp.moveaxis(y_mxBxPxD, 0, 1).reshape(B, m * period, D)[:, :L]
  return _where_alive(theta, alive_BxL, y_BxLxD, x_BxLxD)


@jax.custom_vjp
def _by_period(x, w, scale, own):
  """`x @ own`, which is `w + scale * written` for any derivative.

  Args:
    x: inputs `[m, B, P, D]`.
    w: slow weights `[D, ...]`.
    scale: 1.
    own: the sums `[m, B, D, ...]`, constants.
  """
  return checkpoint_name(_times(x, own), SAVED)


def _times(x, own):
  return jnp.einsum('mbpd,mbd...->mbp...', x, own)


def _by_period_fwd(x, w, scale, own):
  z = _by_period(x, w, scale, own)
  return z, (x, w, own, z)


def _by_period_bwd(kept, d_z):
  x, w, own, z = kept
  # every token has the slow matrix in its own: one product for all
  d_w = jnp.einsum(
    'mbpd,mbp...->d...', x, d_z, preferred_element_type=jnp.float32
  )
  # what was written times its gradient is the product's less that of `w`
  d_scale = _inner(z, d_z) - _inner(w, d_w)
  (d_x,) = jax.linear_transpose(lambda x: _times(x, own), x)(d_z)
  return d_x, d_w.astype(w.dtype), d_scale, jnp.zeros_like(own)


def _inner(a, b):
  return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))


_by_period.defvjp(_by_period_fwd, _by_period_bwd)


def alive(reset_BxL, period: int):
  """Whether a token still sees what its level wrote before its period.

  False from a document's start to the end of the period, `[B, L]`; the stream
  starts where a period does.
  """
  B, L = reset_BxL.shape
  P = min(period, L)
  cut_BxmxP = jnp.pad(reset_BxL, ((0, 0), (0, -L % P))).reshape(B, -1, P)
  return (jnp.cumsum(cut_BxmxP, axis=2) == 0).reshape(B, -1)[:, :L]


def _where_alive(theta: Theta, alive_BxL, y_BxLxD, x_BxLxD):
  """`y` where alive, elsewhere what the slow weights give."""
  if alive_BxL is None:
    return y_BxLxD
  slow_BxLxD = jax.lax.cond(
    alive_BxL.all(),
    jnp.zeros_like,
    lambda x: read(theta, x, y_BxLxD.dtype),
    x_BxLxD,
  )
  return jnp.where(alive_BxL[..., None], y_BxLxD, slow_BxLxD)


def decay(theta: Theta, delta: Theta, x_BxLxD, dtype):
  """Half the squared length of what a level has written, as each token sees it.

  Its gradient is the second term of delta gradient descent, `delta x x^T` for
  inputs `x` of unit norm, layer by layer (NL Eq. 56-57). Inputs are constants.

  Returns:
    float32 `[B, L]`.
  """
  gate, up, down = theta
  x = x_BxLxD.astype(dtype)
  h_BxLxF = jax.nn.silu(jnp.einsum('bld,df->blf', x, gate.astype(dtype)))
  h_BxLxF = h_BxLxF * jnp.einsum('bld,df->blf', x, up.astype(dtype))
  total = 0.0
  for z, d in ((x, delta.gate_DxF), (x, delta.up_DxF), (h_BxLxF, delta[2])):
    z = z.astype(jnp.float32)
    z = z * jax.lax.rsqrt(jnp.square(z).sum(-1, keepdims=True) + 1e-12)
    z = jax.lax.stop_gradient(z).astype(dtype)
    written = jnp.einsum('bli,bio->blo', z, d.astype(dtype))
    total += 0.5 * jnp.square(written.astype(jnp.float32)).sum(-1)
  return total


def compose(
  variant: str,
  levels: Sequence[Callable],
  x_BxLxD,
  mix_P=None,
):
  """Runs the levels of a block over the residual stream.

  Args:
    variant: 'sequential' and 'nested' in a chain (NL Eq. 70), 'independent'
      side by side, their outputs added with the weights `mix_P` (Eq. 74).
    levels: functions of the stream, norm included, residual not; fastest
      first.
    x_BxLxD: the stream.
    mix_P: one learned weight a level, independent only.
  """
  if variant != 'independent':
    for level in levels:
      x_BxLxD = x_BxLxD + level(x_BxLxD)
    return x_BxLxD
  parts = [m.astype(x_BxLxD.dtype) * f(x_BxLxD) for m, f in zip(mix_P, levels)]
  return x_BxLxD + sum(parts)
