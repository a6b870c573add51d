"""Unit lower-triangular systems: values, derivatives, alike keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.models.memory.solve import solve_unit_lower, unit_lower_inverse
from nestax.models.memory.types import unit


def system(C: int, alike: float, dtype=jnp.float32):
  """`eta K K^T` below the diagonal, for keys that share a direction."""
  common, own = jax.random.split(jax.random.key(C))
  keys = alike * jax.random.normal(common, (1, 8))
  keys = unit(keys + jax.random.normal(own, (C, 8)))
  return jnp.tril(keys @ keys.T, -1).astype(dtype)


@pytest.mark.parametrize('C', [1, 3, 16, 17, 48, 64, 100])
@pytest.mark.parametrize('alike', [0.0, 30.0])
def test_inverse_is_exact_even_for_alike_keys(C, alike):
  L = system(C, alike)
  want = np.linalg.inv(np.eye(C) + np.asarray(L, np.float64))
  got = jax.jit(unit_lower_inverse)(L)
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_blocks_of_two_bear_any_entries():
  below = np.tril(np.ones((64, 64)), -1)  # alike keys, twice: a reflection
  want = np.linalg.inv(np.eye(64) + 2 * below)
  got = jax.jit(unit_lower_inverse, static_argnums=1)(
    jnp.asarray(2 * below, jnp.float32), 2
  )
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize('order', [1, 2])
def test_derivatives_equal_those_of_a_library_solver(order):
  with jax.enable_x64(True):
    L = system(20, 1.0, jnp.float64)
    rhs = jax.random.normal(jax.random.key(1), (20, 3), jnp.float64)

    def ours(L, rhs):
      return jnp.sum(jnp.sin(solve_unit_lower(L, rhs, jnp.float64)))

    def library(L, rhs):
      A = jnp.eye(20) + L
      z = jax.scipy.linalg.solve_triangular(
        A, rhs, lower=True, unit_diagonal=True
      )
      return jnp.sum(jnp.sin(z))

    below = jnp.tril(jnp.ones((20, 20)), -1)

    def derivative(f, L, rhs):
      def first(L, rhs):
        to_L, to_rhs = jax.grad(f, argnums=(0, 1))(L, rhs)
        return to_L * below, to_rhs  # the library reads nothing above

      if order == 1:
        return first(L, rhs)
      return jax.grad(
        lambda L, rhs: sum(jnp.sum(jnp.cos(g)) for g in first(L, rhs)),
        argnums=(0, 1),
      )(L, rhs)

    got, want = (
      jax.jit(functools.partial(derivative, f))(L, rhs) for f in (ours, library)
    )
    np.testing.assert_allclose(got[0] * below, want[0] * below, atol=1e-9)
    np.testing.assert_allclose(got[1], want[1], atol=1e-9)
