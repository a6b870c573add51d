"""A function whose gradient is that of kernels, and its derivative a scan's."""

import jax
import jax.numpy as jnp
import numpy as np

from nestax.models.memory.twice import twice


def slow(floats, others):
  (a, b), (n,) = floats, others
  return {'y': jnp.sin(a * b) * n, 'z': a**3}


@jax.custom_vjp
def once(floats, n):
  return slow(floats, [n])


def _back(kept, d_out):
  floats, n = kept
  _, back = jax.vjp(lambda floats: slow(floats, [n]), floats)
  # constants: of this gradient there is no derivative
  return jax.lax.stop_gradient(back(d_out)[0]), None


once.defvjp(lambda *given: (once(*given), given), _back)


def test_the_second_derivative_is_that_of_the_slow_function():
  floats, others = [jnp.float32(0.7), jnp.float32(1.3)], [jnp.int32(3)]

  def of(function):
    def inner(floats):
      out = function(floats, others)
      return jnp.square(out['y']) + out['z']

    def outer(floats):
      a, b = jax.grad(inner)(floats)
      return a * b + inner(floats)

    return jax.jit(jax.value_and_grad(outer))(floats)

  def fast(floats, others):
    return once(floats, *others)

  want, got = of(slow), of(twice(fast, slow))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), got, want)
  missed = of(fast)
  assert abs(missed[1][0] - want[1][0]) > 0.1
