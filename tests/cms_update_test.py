"""Inner optimisers of a level against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.cms import update
from nestax.cms.update import UpdateConfig

n, B, D, F = 2, 3, 6, 4
SHAPES = {'down': (n, B, F, D), 'up': (n, B, D, F)}
RATES = np.array([0.3, 2.0], np.float32)


def gradients(seed=0, size=1.0):
  rng = np.random.default_rng(seed)
  return {
    name: (size * rng.normal(size=shape)).astype(np.float32)
    for name, shape in SHAPES.items()
  }


def zeros():
  return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def newton_schulz(g, steps):
  """One matrix, by the definition of Muon's quintic."""
  a, b, c = update.QUINTIC
  x = g / (np.linalg.norm(g) + 1e-7)
  for _ in range(steps):
    x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
  return x


def plain(cfg, moment, grads, rate):
  """The step of one sequence in one block; trees of matrices."""
  size = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
  if cfg.clip and size > cfg.clip:
    grads = {name: g * cfg.clip / size for name, g in grads.items()}
  if cfg.optimizer in ('momentum', 'muon'):
    moment = {name: cfg.beta * moment[name] + grads[name] for name in grads}
    grads = moment
  if cfg.optimizer == 'muon':
    grads = {k: newton_schulz(g, cfg.ns_steps) for k, g in grads.items()}
  if cfg.optimizer == 'dgd':
    rate = rate / (1 + rate)
  return {name: -rate * g for name, g in grads.items()}, moment


@pytest.mark.parametrize('size', [0.01, 10.0], ids=['small', 'clipped'])
@pytest.mark.parametrize('optimizer', update.OPTIMIZERS)
def test_every_optimizer_steps_as_written_down(optimizer, size):
  cfg = UpdateConfig(optimizer, beta=0.7, clip=1.5)
  moment, want_moment = zeros() if cfg.remembers else None, zeros()
  step = jax.jit(lambda moment, grads: update.step(cfg, moment, grads, RATES))
  for seed in range(3):
    grads = gradients(seed, size)
    got, moment = step(moment, grads)
    for i in range(n):
      for b in range(B):
        old = {name: x[i, b] for name, x in want_moment.items()}
        own = {name: x[i, b] for name, x in grads.items()}
        want, kept = plain(cfg, old, own, RATES[i])
        for name in grads:
          np.testing.assert_allclose(
            got[name][i, b], want[name], rtol=2e-3, atol=1e-5
          )
          want_moment[name][i, b] = kept[name]
    if cfg.remembers:
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        moment,
        want_moment,
      )
    else:
      assert moment is None


def test_clipping_is_of_the_whole_level_of_one_sequence_in_one_block():
  grads = gradients(size=0.01)
  grads['up'][1, 2] *= 1e6
  cfg = UpdateConfig(clip=0.5)
  step, _ = update.step(cfg, None, grads, np.ones(n, np.float32))
  free, _ = update.step(UpdateConfig(clip=0.0), None, grads, np.ones(n))
  size = np.sqrt(update.square(step))
  np.testing.assert_allclose(size[1, 2], 0.5, rtol=1e-5)
  untouched = np.ones((n, B), bool)
  untouched[1, 2] = False
  for name in grads:
    np.testing.assert_array_equal(free[name], -grads[name])
    np.testing.assert_array_equal(
      np.asarray(step[name])[untouched], -grads[name][untouched]
    )
    # the direction stays
    scale = np.asarray(step[name][1, 2]) / -grads[name][1, 2]
    np.testing.assert_allclose(scale, scale.flat[0], rtol=1e-5)


@pytest.mark.parametrize('shape', [(4, 6), (6, 4), (5, 5)], ids=str)
def test_muon_brings_singular_values_near_one(shape):
  rng = np.random.default_rng(1)
  small = min(shape)
  u, _, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
  values = np.geomspace(1.0, 0.02, small)
  x = jnp.asarray((u * values[None]) @ v, jnp.float32)
  got = np.linalg.svd(update.orthogonalize(x, 5), compute_uv=False)
  assert got.min() > 0.65 and got.max() < 1.25
  # the same whatever the scale, with the same singular vectors
  again = update.orthogonalize(1e3 * x, 5)
  np.testing.assert_allclose(again, update.orthogonalize(x, 5), atol=1e-4)
  inner = u.T @ np.asarray(again) @ v.T
  np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-3)


@pytest.mark.parametrize('optimizer', update.OPTIMIZERS)
def test_derivatives_are_finite_at_a_gradient_of_zero(optimizer):
  cfg = UpdateConfig(optimizer)
  moment = zeros() if cfg.remembers else None

  def size(grads, rate):
    step, _ = update.step(cfg, moment, grads, rate)
    return sum(jnp.sum(x * (x + 1)) for x in step.values())

  slopes = jax.jit(jax.grad(size, (0, 1)))
  for grads in (zeros(), {**zeros(), 'up': gradients()['up']}):
    got = slopes(grads, jnp.asarray(RATES))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_the_root_is_flat_at_zero():
  value, slope = jax.value_and_grad(update.root)(0.0)
  assert value == 0 and slope == 0
  np.testing.assert_allclose(jax.grad(update.root)(4.0), 0.25)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'optimizer': 'adam'}, "optimizer='adam': one of"),
    ({'beta': 1.0}, 'beta=1.0: at least 0'),
    ({'clip': -1.0}, 'clip=-1.0'),
    ({'clip': float('inf')}, 'clip=inf'),
    ({'ns_steps': 0}, 'ns_steps=0'),
  ],
  ids=str,
)
def test_impossible_values_are_refused_in_words(values, message):
  with pytest.raises(ValueError, match=message):
    UpdateConfig(**values)
