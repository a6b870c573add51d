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
  """Weights of each sequence, constants, and zeros to differentiate by.

  Tokens that are not `alive`, a number in the dtype of the matmuls, are read
  with the `slow` weights of all: a document has started before them.
  """

  own: Own
  taps: Factors
  slow: Own | None = None
  alive_BxL: jax.Array | None = None


def tap(own: Own, L: int, slow: Own | None = None, alive_BxL=None) -> Tapped:
  """Weights, `[B, ...]` or with more axes in front, to be read by L tokens.

  `slow` has the axes in front without B; `alive_BxL` is a mask, None for all.
  """
  *front, D, _, F = own.both_Dx2xF.shape
  dtype = own.down_FxD.dtype
  shapes = ((*front, L, *last) for last in ((D,), (2, F), (F,), (D,)))
  taps = Factors(*(jnp.zeros(shape, dtype) for shape in shapes))
  if alive_BxL is None:
    return Tapped(own, taps)
  alive = jnp.broadcast_to(alive_BxL.astype(dtype), (*front, L))
  return Tapped(own, taps, slow, alive)


def hidden(both_2xF):
  """`silu(gate) * up` of both products, any axes in front."""
  return jax.nn.silu(both_2xF[..., 0, :]) * both_2xF[..., 1, :]


def _times(tapped: Tapped, name: str, x_BxL, product: str):
  """Tokens times a matrix, their sequence's or where not alive that of all.

  `product` is an einsum whose second operand begins with `b`.
  """
  y_BxL = jnp.einsum(product, x_BxL, getattr(tapped.own, name))
  if tapped.alive_BxL is None:
    return y_BxL
  slow = getattr(tapped.slow, name)
  slow_BxL = jnp.einsum(product.replace(',b', ','), x_BxL, slow)
  shape = tapped.alive_BxL.shape + (1,) * (y_BxL.ndim - 2)
  return jnp.where(tapped.alive_BxL.reshape(shape) > 0, y_BxL, slow_BxL)


@jax.custom_vjp
def read(tapped: Tapped, x_BxLxD):
  """One level's output; the gradient by the taps is the `Factors`."""
  return _read_fwd(tapped, x_BxLxD)[0]


def _read_fwd(tapped, x_BxLxD):
  both_BxLx2xF = _times(tapped, 'both_Dx2xF', x_BxLxD, 'bld,bdgf->blgf')
  hidden_BxLxF = hidden(both_BxLx2xF)
  out_BxLxD = _times(tapped, 'down_FxD', hidden_BxLxF, 'blf,bfd->bld')
  return out_BxLxD, (tapped, x_BxLxD, both_BxLx2xF, hidden_BxLxF)


def _read_bwd(saved, d_out):
  tapped, x, both, hidden_BxLxF = saved
  _, back = jax.vjp(hidden, both)
  (d_both,) = back(_times(tapped, 'down_FxD', d_out, 'bld,bfd->blf'))
  d_x = _times(tapped, 'both_Dx2xF', d_both, 'blgf,bdgf->bld')
  none = jax.tree.map(jnp.zeros_like, tapped)
  return none._replace(taps=Factors(x, d_both, hidden_BxLxF, d_out)), d_x


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
