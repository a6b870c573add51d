"""The gradient of a level's weights, kept as its two factors until it is due.

The gradient of `x @ w` by `w` is the sum over tokens of `x dz^T`, `dz` being
that of the product. While weights stay as they are, all of a period, tokens
are far smaller to keep than the matrices that they add up to, which would be
read and written again at every chunk. So a level is read with its weights for
constants and `taps` of zeros beside them, and the gradient by the taps is not
that of zeros, but what both factors are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.cms.level import Own, Theta


class Factors(NamedTuple):
  """Of one level in one block, in the dtype of the matmuls."""

  x_BxLxD: jax.Array  # what `gate` and `up` multiply
  both_BxLx2xF: jax.Array  # gradients of both products
  hidden_BxLxF: jax.Array  # what `down` multiplies
  out_BxLxD: jax.Array  # gradient of its product


class Tapped(NamedTuple):
  """Weights of each sequence, constants, and zeros to differentiate by."""

  own: Own
  taps: Factors


def tap(own: Own, L: int) -> Tapped:
  """Weights, `[B, ...]` or with more axes in front, to be read by L tokens."""
  *front, D, _, F = own.both_Dx2xF.shape
  shapes = ((*front, L, *last) for last in ((D,), (2, F), (F,), (D,)))
  return Tapped(
    own, Factors(*(jnp.zeros(shape, own.down_FxD.dtype) for shape in shapes))
  )


def hidden(both_2xF):
  """`silu(gate) * up` of both products, any axes in front."""
  return jax.nn.silu(both_2xF[..., 0, :]) * both_2xF[..., 1, :]


def _products(x_BxLxD, own: Own):
  return jnp.einsum('bld,bdgf->blgf', x_BxLxD, own.both_Dx2xF)


@jax.custom_vjp
def read(tapped: Tapped, x_BxLxD):
  """One level's output; the gradient by the taps is the `Factors`."""
  own, _ = tapped
  return hidden(_products(x_BxLxD, own)) @ own.down_FxD


def _read_fwd(tapped, x_BxLxD):
  own, _ = tapped
  both_BxLx2xF = _products(x_BxLxD, own)
  hidden_BxLxF = hidden(both_BxLx2xF)
  saved = own, x_BxLxD, both_BxLx2xF, hidden_BxLxF
  return hidden_BxLxF @ own.down_FxD, saved


def _read_bwd(saved, d_out):
  own, x, both, hidden_BxLxF = saved
  _, back = jax.vjp(hidden, both)
  (d_both,) = back(d_out @ own.down_FxD.mT)
  d_x = jnp.einsum('blgf,bdgf->bld', d_both, own.both_Dx2xF)
  none = jax.tree.map(jnp.zeros_like, own)
  return Tapped(none, Factors(x, d_both, hidden_BxLxF, d_out)), d_x


read.defvjp(_read_fwd, _read_bwd)


def kept(reset_BxP, C: int):
  """Which tokens of a period its level learns from, `[B, P]`.

  Those of chunks in which no document starts, nor after them in the period.

  Args:
    reset_BxP: True where a document starts.
    C: tokens a chunk.
  """
  B, P = reset_BxP.shape
  cut_BxnxC = reset_BxP.reshape(B, P // C, C)
  inside_Bxn = cut_BxnxC[:, :, 1:].any(-1)
  later_Bxn = jax.lax.cummax(
    cut_BxnxC.any(-1).astype(jnp.int32), axis=1, reverse=True
  )
  later_Bxn = jnp.pad(later_Bxn[:, 1:], ((0, 0), (0, 1))) > 0
  return jnp.repeat(~(inside_Bxn | later_Bxn), C, axis=1)


def added_up(found: Factors, kept_BxP=None) -> Theta:
  """The gradient of the weights, a sum over the tokens of a period.

  Args:
    found: with axes in front of `[B, P, ...]`, or none.
    kept_BxP: tokens that count; None for all.
  """
  if kept_BxP is not None:
    shape = (1,) * (found.x_BxLxD.ndim - 3) + kept_BxP.shape

    def counted(x):
      mask = kept_BxP.reshape(shape + (1,) * (x.ndim - len(shape)))
      return jnp.where(mask, x, jnp.zeros_like(x))

    # both factors: 0 * inf would spoil the sum
    found = jax.tree.map(counted, found)
  x, d_both, h, d_out = found
  both = jnp.einsum('...pd,...pgf->...dgf', x, d_both)
  return Theta(both[..., 0, :], both[..., 1, :], h.mT @ d_out)
