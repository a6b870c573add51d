"""Levels as they are read: slow weights, own weights, decay, composition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.cms import chain
from nestax.cms.level import Own, Theta, Writes

B, L, D, F = 3, 5, 4, 6


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def theta(seed=0, *leading):
  return Theta(
    normal(seed, *leading, D, F),
    normal(seed + 1, *leading, D, F),
    normal(seed + 2, *leading, F, D),
  )


def plain(weights, x_D):
  gate, up, down = (np.asarray(w) for w in weights)
  z = x_D @ gate
  return (z / (1 + np.exp(-z)) * (x_D @ up)) @ down


def close(a, b, atol=1e-5):
  np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def test_a_level_is_a_gated_mlp():
  x = normal(9, B, L, D)
  got = chain.read(theta(), x, jnp.float32)
  close(got, [[plain(theta(), x_D) for x_D in row] for row in np.asarray(x)])


def test_each_sequence_reads_with_what_it_has_written():
  x, delta = normal(9, B, L, D), theta(3, B)
  got = chain.read_fast(theta(), delta, x, jnp.float32)
  for b in range(B):
    own = Theta(*(t + d[b] for t, d in zip(theta(), delta)))
    close(got[b], chain.read(own, x[b : b + 1], jnp.float32)[0])
    close(got[b], [plain(own, x_D) for x_D in np.asarray(x[b])])


@pytest.mark.parametrize('rows', [(), (1,), (0, 1, 2)], ids=str)
def test_tokens_of_a_document_that_began_read_the_slow_weights(rows):
  x, delta = normal(9, B, L, D), theta(3, B)
  alive = np.ones((B, L), bool)
  for b in rows:
    alive[b, 1 + b :] = False
  got = chain.read_fast(theta(), delta, x, jnp.float32, jnp.asarray(alive))
  fast = chain.read_fast(theta(), delta, x, jnp.float32)
  slow = chain.read(theta(), x, jnp.float32)
  close(got, np.where(alive[..., None], fast, slow))


def test_nothing_written_is_the_ordinary_level():
  x, nothing = normal(9, B, L, D), jax.tree.map(jnp.zeros_like, theta(3, B))
  got = chain.read_fast(theta(), nothing, x, jnp.float32)
  close(got, chain.read(theta(), x, jnp.float32), 1e-6)


def test_the_gradient_of_the_decay_is_delta_x_xt():
  x, delta = np.asarray(normal(9, B, L, D)), theta(3, B)
  decay = lambda delta: chain.decay(theta(), delta, x, jnp.float32).sum()  # noqa: E731
  grads = jax.tree.map(np.asarray, jax.jit(jax.grad(decay))(delta))
  gate, up, _ = (np.asarray(w) for w in theta())
  z = x @ gate
  hidden = z / (1 + np.exp(-z)) * (x @ up)
  for got, d, inputs in zip(grads, delta, (x, x, hidden)):
    inputs = inputs / np.linalg.norm(inputs, axis=-1, keepdims=True)
    for b in range(B):
      # kernels take inputs from the left: x x^T delta
      close(got[b], inputs[b].T @ inputs[b] @ np.asarray(d[b]), 1e-4)


def test_the_decay_takes_inputs_for_constants():
  x, delta = normal(9, B, L, D), theta(3, B)
  slope = jax.grad(
    lambda slow, x: chain.decay(slow, delta, x, jnp.float32).sum(), (0, 1)
  )(theta(), x)
  assert not any(g.any() for g in jax.tree.leaves(slope))


@pytest.mark.parametrize('variant', chain.VARIANTS)
def test_levels_are_composed_as_the_variant_says(variant):
  x, mix = normal(9, B, L, D), jnp.array([0.5, 2.0])

  def level(seed):
    return lambda x: chain.read(theta(seed), x, jnp.float32)

  first, second = level(0), level(5)
  got = chain.compose(variant, [first, second], x, mix)
  if variant == 'independent':
    close(got, x + 0.5 * first(x) + 2.0 * second(x))
  else:
    middle = x + first(x)
    close(got, middle + second(middle))


def test_dtypes_are_those_asked_for():
  x, delta = normal(9, B, L, D), theta(3, B)
  assert chain.read(theta(), x, jnp.bfloat16).dtype == jnp.bfloat16
  fast = chain.read_fast(theta(), delta, x, jnp.bfloat16)
  assert fast.dtype == jnp.bfloat16
  assert chain.decay(theta(), delta, x, jnp.bfloat16).dtype == jnp.float32


@pytest.mark.parametrize('period, L', [(4, 11), (16, 5)], ids=str)
def test_periods_are_read_at_once_as_one_by_one(period, L):
  m, x = (L - 1) // period, normal(9, B, L, D)
  reset = np.zeros((B, L), bool)
  reset[0, [0, L - 1]] = reset[1, [2, 4]] = True
  start = jnp.float32(1.0), theta(), theta(3, max(m, 1), B), x

  def at_once(scale, slow, delta, x):
    alive = chain.alive(jnp.asarray(reset), period)
    zero = [jnp.zeros_like(d[:1]) for d in delta]
    delta = Theta(*(jnp.concatenate([z, d[:m]]) for z, d in zip(zero, delta)))
    own = chain.own(jax.tree.map(lambda t: t[None], slow), delta, jnp.float32)
    writes = Writes(scale, Own(*map(jax.lax.stop_gradient, own)))
    return chain.read_writes(slow, writes, x, jnp.float32, period, alive)

  def one_by_one(scale, slow, delta, x):
    out = []
    for i in range(m + 1):
      own = jax.tree.map(lambda d, i=i: scale * d[i - 1] * (i > 0), delta)
      cut = slice(i * period, (i + 1) * period)
      alive = np.cumsum(reset[:, cut], axis=1) == 0
      alive = jnp.asarray(alive)
      out.append(chain.read_fast(slow, own, x[:, cut], jnp.float32, alive))
    return jnp.concatenate(out, axis=1)

  def both(read, *given):
    def score(*given):
      y = read(*given)
      return jnp.sin(y).sum(), y

    grads = jax.jit(jax.grad(score, (0, 1, 3), has_aux=True))
    return grads(*given)

  got, want = both(at_once, *start), both(one_by_one, *start)
  jax.tree.map(lambda a, b: close(a, b, 1e-4), got, want)
