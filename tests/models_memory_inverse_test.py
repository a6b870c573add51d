"""Inverses of unit lower-triangular tiles by full-width matmuls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.models.memory.inverse import dense_inverse
from nestax.models.memory.types import unit


@pytest.mark.parametrize('C', [8, 16, 64, 128])
@pytest.mark.parametrize('alike', [0.0, 30.0])
@pytest.mark.parametrize(
  'dtype,tolerance', [('float32', 2e-6), ('bfloat16', 8e-3)]
)
def test_inverse_is_close_even_for_alike_keys(C, alike, dtype, tolerance):
  common, own = jax.random.split(jax.random.key(C))
  keys = alike * jax.random.normal(common, (1, 8))
  keys = unit(keys + jax.random.normal(own, (C, 8)))
  # rates go up to 0.5 by default; L holds rate times key products
  L = 0.5 * jnp.tril(keys @ keys.T, -1)
  want = np.linalg.inv(np.eye(C) + np.asarray(L, np.float64))
  got = jax.jit(dense_inverse, static_argnums=1)(L, jnp.dtype(dtype))
  np.testing.assert_allclose(got, want, atol=tolerance)
