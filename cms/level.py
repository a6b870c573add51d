"""One level of the continuum as a function of its weights (NL Eq. 70)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Theta(NamedTuple):
  """The weights of one level's gated MLP (SwiGLU)."""

  gate_DxF: jax.Array
  up_DxF: jax.Array
  down_FxD: jax.Array


def read(theta: Theta, x_BxLxD, dtype):
  """`down(silu(gate x) * up x)`; the caller adds the residual.

  Args:
    theta: weights, any float dtype.
    x_BxLxD: normalised input.
    dtype: of the matmuls' operands and of the result.
  """
  gate, up, down = (w.astype(dtype) for w in theta)
  x = x_BxLxD.astype(dtype)
  h_BxLxF = jax.nn.silu(jnp.einsum('bld,df->blf', x, gate))
  h_BxLxF = h_BxLxF * jnp.einsum('bld,df->blf', x, up)
  return jnp.einsum('blf,fd->bld', h_BxLxF, down)
