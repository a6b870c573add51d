"""Pallas's Triton, which GPU kernels are written in; None where JAX has none.

JAX 0.11 warns that a later version will leave it out. There everything runs as
on other machines, and GPUs fall back to what has no kernels.
"""

try:
  from jax.experimental.pallas import triton
except ImportError:
  triton = None

LACKS = 'this version of JAX has no Pallas Triton'
