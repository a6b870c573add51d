"""Which positions are scored, and what the objectives sum over them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestax.cms import objective

B, L, V, D = 3, 6, 7, 4


def tokens():
  return jax.random.randint(jax.random.key(0), (B, L), 0, V)


def resets():
  """A document starts at the first token of row 0, inside row 1."""
  return np.zeros((B, L), bool) | (
    np.arange(L)[None] == np.array([0, 3, -1])[:, None]
  )


@pytest.mark.parametrize('reset', [None, resets()], ids=['', 'resets'])
@pytest.mark.parametrize('length', [None, (6, 5, 0), (1, 4, 3)], ids=str)
def test_a_position_is_scored_if_its_document_goes_on_in_the_chunk(
  length, reset
):
  length_B = None if length is None else jnp.array(length)
  got = objective.scored(reset, length_B, B, L)
  want = np.zeros((B, L), bool)
  for b in range(B):
    for t in range(L):
      end = L if length is None else length[b]
      starts = reset is not None and t + 1 < L and reset[b, t + 1]
      want[b, t] = t + 1 < end and not starts
  np.testing.assert_array_equal(got, want)


def test_next_token_is_the_cross_entropy_of_optax():
  logits = 3 * jax.random.normal(jax.random.key(1), (B, L, V))
  scored = objective.scored(resets(), jnp.array([6, 6, 3]), B, L)
  got = objective.next_token(logits, tokens(), scored)
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], tokens()[:, 1:]
  )
  want = np.where(scored[:, :-1], nats, 0).sum(1)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  # bfloat16 logits are summed in float32
  half = objective.next_token(logits.astype(jnp.bfloat16), tokens(), scored)
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, want, rtol=0.02)


def test_cross_entropy_is_differentiated_twice_as_optax_is():
  logits = 3 * jax.random.normal(jax.random.key(1), (B, L, V))
  along = jax.random.normal(jax.random.key(3), (B, L, V))

  def derivatives(of):
    def inner(logits):
      return jnp.sin(of(logits, tokens())).sum()

    def outer(logits):
      value, grad = jax.value_and_grad(inner)(logits)
      return value * (grad * along).sum()

    return jax.jit(jax.value_and_grad(outer))(logits)

  got = derivatives(objective.cross_entropy)
  want = derivatives(optax.softmax_cross_entropy_with_integer_labels)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), got, want
  )


def test_reconstruction_regresses_the_next_key():
  y, key = jax.random.normal(jax.random.key(2), (2, B, L, D))
  scale = jnp.arange(1.0, D + 1)[None, None]
  scored = objective.scored(resets(), jnp.array([6, 6, 3]), B, L)
  got = objective.reconstruction(y, key, scale, scored)
  want = np.zeros(B)
  for b in range(B):
    for t in range(L - 1):
      error = np.asarray(y[b, t] - scale[0, 0] * key[b, t + 1])
      want[b] += scored[b, t] * 0.5 * np.mean(error**2)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_what_is_not_scored_has_no_gradient():
  logits = jax.random.normal(jax.random.key(1), (B, L, V))
  scored = objective.scored(resets(), jnp.array([6, 6, 3]), B, L)
  grads = jax.grad(
    lambda logits: objective.next_token(logits, tokens(), scored).sum()
  )(logits)
  np.testing.assert_array_equal(np.abs(grads).max(-1) > 0, scored)


def test_targets_may_be_bytes_of_a_vocabulary_beyond_them():
  logits_BxLxV = jax.random.normal(jax.random.key(0), (2, 5, 300))
  targets_BxL = jnp.array([[0, 1, 2, 43, 255], [44, 3, 254, 9, 0]])
  both = jax.value_and_grad(lambda x, t: objective.cross_entropy(x, t).sum())
  want = both(logits_BxLxV, targets_BxL)
  got = both(logits_BxLxV, targets_BxL.astype(jnp.uint8))
  jax.tree.map(np.testing.assert_array_equal, got, want)
