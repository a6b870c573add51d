"""Divergences against plain ones, word by word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.sleep import distributions
from nestax.sleep.reader import NEVER

W = 4  # words of the tables


def table(seed):
  return 1.5 * jax.random.normal(jax.random.key(seed), (W, W))


def plain_divergence(name, t, s):
  p = np.exp(t) / np.exp(t).sum()
  q = np.exp(s) / np.exp(s).sum()
  m = (p + q) / 2
  kl = lambda a, b: (a * np.log(a / b)).sum()  # noqa: E731
  return {
    'forward_kl': kl(p, q),
    'reverse_kl': kl(q, p),
    'jsd': kl(p, m) / 2 + kl(q, m) / 2,
  }[name]


@pytest.mark.parametrize('name', distributions.DIVERGENCES)
def test_divergences_are_what_they_are_called(name):
  t, s = table(0), table(1)
  got = distributions.divergence(name, t[None], s[None])[0]
  want = [plain_divergence(name, *row) for row in zip(np.array(t), np.array(s))]
  np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize('name', distributions.DIVERGENCES)
def test_words_that_are_not_allowed_make_no_divergence(name):
  t, s = (x.at[:, 0].set(NEVER)[None] for x in (table(0), table(1)))
  got, grad = jax.value_and_grad(
    lambda s: distributions.divergence(name, t, s).sum()
  )(s)
  cut = distributions.divergence(name, t[..., 1:], s[..., 1:]).sum()
  np.testing.assert_allclose(got, cut, rtol=1e-5)
  assert jnp.isfinite(grad).all()
