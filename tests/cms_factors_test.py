"""Gradients of levels kept as factors, and states that seldom change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.cms import chain, factors
from nestax.cms.level import Theta
from nestax.cms.once import once

B, C, n, D, F = 3, 4, 5, 6, 7  # n chunks of C tokens in a period


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def theta(seed, *leading):
  shapes = (D, F), (D, F), (F, D)
  # small, so that what is summed is not far larger than its sum
  return Theta(
    *(0.3 * normal(seed + i, *leading, *s) for i, s in enumerate(shapes))
  )


def resets(rate=0.08):
  return np.random.default_rng(0).random((B, n * C)) < rate


def close(a, b, atol=2e-5):
  np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize('broken', [False, True])
def test_factors_add_up_to_the_gradient_by_the_weights(broken):
  slow, delta, x = theta(0), theta(3, B), normal(9, B, n * C, D)
  mask = factors.kept(jnp.asarray(resets()), C) if broken else None
  counts = jnp.ones((B, n * C)) if mask is None else mask.astype(jnp.float32)

  def score(y):
    return (jnp.sin(y) * counts[..., None]).sum()

  def plain(delta, x):
    return score(chain.read_fast(slow, delta, x, jnp.float32))

  def tapped(tap, x):
    return score(chain.read_fast(slow, tap, x, jnp.float32))

  want, d_want = jax.jit(jax.grad(plain, (0, 1)))(delta, x)
  tap = factors.tap(chain.own(slow, delta, jnp.float32), n * C)
  grads, d_got = jax.jit(jax.grad(tapped, (0, 1)))(tap, x)
  found = grads.taps
  assert not any(leaf.any() for leaf in jax.tree.leaves(grads.own))
  close(d_got, d_want)
  if broken:  # what does not count may be anything
    found = jax.tree.map(
      lambda f: jnp.where(mask.reshape(mask.shape + (1,) * (f.ndim - 2)), f,
                          jnp.inf), found)  # fmt: skip
  add_up = jax.jit(lambda found: factors.added_up(found, mask))
  jax.tree.map(close, add_up(found), want)
  both = jax.tree.map(lambda f: np.stack([f, 2 * f]), found)
  for i, times in enumerate((1, 4)):
    got = jax.tree.map(lambda g, i=i: np.asarray(g)[i], add_up(both))
    jax.tree.map(lambda g, w, t=times: close(g, t * w, 1e-4), got, want)


def test_tokens_of_a_document_pass_by_what_was_written_before_it():
  slow, delta, x = theta(0), theta(3, B), normal(9, B, C, D)
  # a document of row 1 has started before the chunk, one of row 2 inside it
  kept_B = jnp.array([1.0, 0.0, 1.0])
  alive = jnp.ones((B, C), bool).at[2, 2:].set(False)

  def gated(delta):
    return jax.tree.map(lambda d: d * kept_B[:, None, None], delta)

  def tap(delta, slow):
    own, of_all = (chain.own(slow, d, jnp.float32) for d in (delta, None))
    return factors.tap(own, C, of_all, alive & (kept_B[:, None] > 0))

  def plain(delta, slow, x):
    return chain.read_fast(slow, gated(delta), x, jnp.float32, alive)

  def tapped(delta, slow, x):
    return chain.read_fast(slow, tap(delta, slow), x, jnp.float32)

  def outer(read):
    def of(delta, slow):
      y, back = jax.vjp(lambda x: read(delta, slow, x), x)
      return jnp.sin(y).sum() + jnp.square(back(jnp.cos(y))[0]).sum(), y

    return jax.jit(jax.grad(of, (0, 1), has_aux=True))(delta, slow)

  want, got = outer(plain), outer(tapped)
  jax.tree.map(close, got, want)
  assert not want[0][0].up_DxF[1].any() and want[0][0].up_DxF[2].any()

  def score(delta, alive_BxL=None):
    y = chain.read_fast(slow, delta, x, jnp.float32, alive_BxL)
    return jnp.where(alive[..., None], jnp.sin(y), 0.0).sum()

  # a row that reads the slow weights learns how those would change
  found = jax.jit(lambda d: jax.grad(score)(tap(d, slow)).taps)(delta)
  want = jax.jit(lambda d: jax.grad(score)(gated(d), alive))(delta)
  jax.tree.map(close, factors.added_up(found, alive), want)
  assert want.up_DxF[1].any()


def test_a_period_learns_from_whole_chunks_after_its_last_document():
  reset_BxP = resets()
  assert reset_BxP[:, ::C].any() and reset_BxP.any(1).sum() > 1
  want = np.ones((B, n * C), bool)
  for b, t in zip(*np.nonzero(reset_BxP)):
    # what was read before is forgotten, and a chunk that it breaks
    want[b, : t // C * C + (C if t % C else 0)] = False
  assert 0 < want.sum() < want.size
  np.testing.assert_array_equal(factors.kept(jnp.asarray(reset_BxP), C), want)


@pytest.mark.parametrize('due', [False, True])
def test_once_is_a_condition_in_values_and_derivatives(due):
  state = {'x': normal(0, 3), 'count': jnp.int32(4)}

  def by(how):
    def run(factor, x, due):
      change = lambda s: {'x': s['x'] * factor, 'count': s['count'] + 1}  # noqa: E731
      return how(due, change, state | {'x': x})

    def score(factor, x, due):
      return jnp.sin(run(factor, x, due)['x']).sum()

    given = 1.7, state['x'], jnp.asarray(due)
    return jax.jit(run)(*given), jax.jit(jax.grad(score, (0, 1)))(*given)

  condition = by(lambda due, f, s: jax.lax.cond(due, f, lambda s: s, s))
  jax.tree.map(close, by(once), condition)
  assert (condition[0]['count'] == 5) == due
