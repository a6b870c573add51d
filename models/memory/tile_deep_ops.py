"""Pieces of a chunk of two-layer memories whose derivatives are in closed form.

Kernels take the derivative of `tile_deep` as a whole. What is found here by
hand spares it what a derivative by rule would do: differentiate an inverse, or
a hyperbolic tangent twice.
"""

import functools

import jax
import jax.numpy as jnp

from nestax.models.memory.tile_ops import nn, nt, outer, tn

CUBE = 0.044715  # of gelu's approximation by tanh
SCALE = 0.7978845608028654  # sqrt(2 / pi)


def _gelu(x):
  """`jax.nn.gelu` and what gives its derivatives."""
  x2 = x * x
  t = jnp.tanh(x * (SCALE + SCALE * CUBE * x2))
  half = 0.5 + 0.5 * t
  return half, t, SCALE + 3.0 * SCALE * CUBE * x2


def _slope(x):
  half, t, y = _gelu(x)
  return x * half, half + 0.5 * x * (1.0 - t * t) * y


@jax.custom_vjp
def gelu(x):
  """`jax.nn.gelu`."""
  return x * _gelu(x)[0]


@jax.custom_vjp
def gelu_slope(x):
  """(gelu, its derivative)."""
  return _slope(x)


def _gelu_back(slope, d):
  return (slope * d,)


def _gelu_slope_fwd(x):
  half, t, y = _gelu(x)
  flat = 1.0 - t * t
  slope = half + 0.5 * x * flat * y
  curve = flat * (y + x * (3.0 * SCALE * CUBE * x - t * y * y))
  return (x * half, slope), (slope, curve)


gelu.defvjp(_slope, _gelu_back)
gelu_slope.defvjp(_gelu_slope_fwd, lambda by, d: (by[0] * d[0] + by[1] * d[1],))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def solve(L_CxC, T_CxC, rhs_CxN, dtype):
  """`(I + L)^-1 rhs`, T the inverse: `d_rhs = T^T d`, `d_L = -d_rhs Z^T`."""
  return nn(T_CxC, rhs_CxN, dtype)


def _solve_back(dtype, kept, d_CxN):
  T, Z = kept
  d_rhs = tn(T, d_CxN, dtype)
  return -nt(d_rhs, Z, dtype), jnp.zeros_like(T), d_rhs


def _solve_fwd(L, T, rhs, dtype):
  Z = nn(T, rhs, dtype)
  return Z, (T, Z)


solve.defvjp(_solve_fwd, _solve_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def solve_rows(L_CxC, T_CxC, rhs_8xC, dtype):
  """The same of few right-hand sides that are rows."""
  return nt(rhs_8xC, T_CxC, dtype)


def _solve_rows_back(dtype, kept, d_8xC):
  T, Z_8xC = kept
  d_rhs = nn(d_8xC, T, dtype)
  return -outer(d_rhs, Z_8xC), jnp.zeros_like(T), d_rhs


def _solve_rows_fwd(L, T, rhs, dtype):
  Z = nt(rhs, T, dtype)
  return Z, (T, Z)


solve_rows.defvjp(_solve_rows_fwd, _solve_rows_back)
