"""Convolution, rotary angles, norms and linear maps against plain loops."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.models import layers

B, L, H, K = 2, 9, 2, 4


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def made(module, *inputs):
  """Parameters of the module, all of them random, and its apply."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  variables = jax.tree.map(lambda x: normal(3, *x.shape), nn.unbox(shapes))
  return variables, jax.jit(module.apply)


def convolve(kernel, tail, x, reset):
  """Every output and the next tail, one product at a time."""
  taps, before = len(kernel), len(kernel) - 1
  seen = np.concatenate([tail, x], axis=1).astype(np.float64)
  y = np.zeros(x.shape)
  for b in range(B):
    start = 0  # the first index of `seen` that the document holds
    for t in range(x.shape[1]):
      start = t + before if reset is not None and reset[b, t] else start
      for back in range(taps):
        at = t + before - back
        if at >= start:
          y[b, t] += kernel[taps - 1 - back] * seen[b, at]
    seen[b, :start] = 0
  return seen[:, seen.shape[1] - before :], y


starts = jax.jit(layers.segment_starts)
rotary = jax.jit(layers.rotary, static_argnums=2)
SOME = np.zeros((B, L), bool)
SOME[[0, 1, 1, 1], [2, 0, 6, 7]] = True


@pytest.mark.parametrize('taps', [1, 2, 4])
@pytest.mark.parametrize('reset', [None, SOME], ids=['', 'resets'])
@pytest.mark.parametrize('length', [2, L])
def test_convolution_equals_a_loop_with_tails_and_resets(taps, reset, length):
  reset = None if reset is None else reset[:, :length]
  start = None if reset is None else starts(reset)
  tail, x = normal(1, B, taps - 1, H, K), normal(2, B, length, H, K)
  variables, run = made(layers.CausalConv((H, K), taps), tail, x, start)
  got_tail, got = run(variables, tail, x, start)
  kernel = np.asarray(variables['params']['kernel'])
  want_tail, want = convolve(kernel, tail, x, reset)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(got_tail, want_tail, atol=1e-6)


@pytest.mark.parametrize('cuts', [(3, 6), tuple(range(1, L))])
def test_a_convolved_stream_may_be_cut_anywhere(cuts):
  x, empty = normal(2, B, L, H, K), jnp.zeros((B, 3, H, K))
  module = layers.CausalConv((H, K), 4)
  variables, run = made(module, empty, x, None)
  want_tail, want = run(variables, empty, x, starts(SOME))
  tail, out = empty, []
  for a, b in zip([0, *cuts], [*cuts, L]):
    start = starts(SOME[:, a:b])
    tail, y = run(variables, tail, x[:, a:b], start)
    out.append(y)
  np.testing.assert_allclose(np.concatenate(out, axis=1), want, atol=1e-6)
  np.testing.assert_allclose(tail, want_tail, atol=1e-6)


def test_segment_starts_are_the_last_reset_or_long_ago():
  before = layers.LONG_AGO
  np.testing.assert_array_equal(
    starts(SOME)[:, :8],
    [[before, before, 2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 6, 7]],
  )


def positions(*values):
  return jnp.asarray([values] * B, jnp.int32)


def test_rotary_keeps_norms_and_leaves_position_zero_alone():
  x = normal(1, B, 3, H, K)
  y = rotary(x, positions(0, 5, 4000), 10_000.0)
  np.testing.assert_allclose(
    np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
  )
  np.testing.assert_array_equal(y[:, 0], x[:, 0])
  assert np.abs(y[:, 1:] - x[:, 1:]).max() > 0.1


@pytest.mark.parametrize('shift', [1, 17, 1000, 1_000_003, 20_000_001])
def test_rotary_products_depend_on_the_distance_alone(shift):
  q, k = normal(1, B, 1, H, K), normal(2, B, 1, H, K)

  def product(at_q, at_k):
    a = rotary(q, positions(at_q), 100.0)
    b = rotary(k, positions(at_k), 100.0)
    return np.sum(a * b, axis=-1)

  here = product(7, 3)
  np.testing.assert_allclose(product(7 + shift, 3 + shift), here, atol=1e-5)
  assert np.abs(product(8, 3) - here).max() > 0.1


def test_rotary_turns_each_pair_by_its_own_rate():
  x = jnp.broadcast_to(jnp.asarray([1.0, 1, 0, 0]), (B, 1, H, K))
  y = rotary(x, positions(3), 100.0)
  # pairs (0, 2) and (1, 3); rates 1 and 100 ** -0.5
  want = [np.cos(3.0), np.cos(0.3), np.sin(3.0), np.sin(0.3)]
  np.testing.assert_allclose(y[0, 0, 0], want, atol=1e-6)


@pytest.mark.parametrize('shape', [(K,), (H, K)])
def test_rms_norm_divides_by_the_root_mean_square_of_the_last_axis(shape):
  x = 7 * normal(1, B, L, H, K)
  variables, run = made(layers.RMSNorm(shape, (None,) * len(shape)), x)
  scale = np.asarray(variables['params']['scale'])
  rms = np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True))
  np.testing.assert_allclose(run(variables, x), x / rms * scale, rtol=1e-5)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
  x = (300 * normal(1, B, L, K)).astype(jnp.bfloat16)
  norm = layers.RMSNorm((K,), ('activation',), 0.5, jnp.bfloat16)
  variables = nn.unbox(norm.init(jax.random.key(0), x))
  y = np.asarray(norm.apply(variables, x))
  assert y.dtype == jnp.bfloat16
  wide = np.asarray(x, np.float32)
  want = 0.5 * wide / np.sqrt(np.mean(wide**2, -1, keepdims=True))
  np.testing.assert_allclose(y.astype(np.float32), want, rtol=2**-8)


def test_rms_norm_of_zeros_is_zero():
  norm = layers.RMSNorm((K,), ('activation',))
  zeros = jnp.zeros((B, K))
  variables = norm.init(jax.random.key(0), zeros)
  np.testing.assert_array_equal(norm.apply(variables, zeros), zeros)


def test_a_linear_map_starts_with_its_gain_over_the_root_of_its_inputs():
  linear = layers.Linear(
    'bd,dhk->bhk', (64, 8, 32), ('embed', 'heads', 'head_dim'), 64, gain=0.25
  )
  x = normal(1, 128, 64)
  y, variables = linear.init_with_output(jax.random.key(0), x)
  kernel = nn.unbox(variables)['params']['kernel']
  np.testing.assert_allclose(np.std(kernel), 0.25 / 8, rtol=0.03)
  np.testing.assert_allclose(np.std(y), 0.25, rtol=0.05)


@pytest.mark.parametrize('equation', ['bld,vd->blv', 'bld,dv->blv'])
def test_gradients_of_logits_are_products_in_the_dtype_of_the_table(equation):
  x, table = normal(1, B, L, K), normal(2, K, K)

  def grads(dtype, logits):
    def score(x, table):
      y = logits(equation, x, table)
      assert y.dtype == jnp.float32
      return jnp.sin(y).sum()

    return jax.grad(score, (0, 1))(x.astype(dtype), table.astype(dtype))

  plain = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  for dtype, size in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
    got, want = grads(dtype, layers.logits), grads(dtype, plain)
    for a, b in zip(got, want):
      assert a.dtype == dtype
      a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
      np.testing.assert_allclose(a, b, rtol=size, atol=size)
  made = jax.make_jaxpr(lambda: grads(jnp.bfloat16, layers.logits))()
  products = [e for e in made.eqns if e.primitive.name == 'dot_general']
  assert len(products) >= 2
  for product in products:
    assert {x.aval.dtype.name for x in product.invars} == {'bfloat16'}
