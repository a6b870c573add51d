"""A level's gathering, commits, forgetting and restarts against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.cms import level as levels
from nestax.cms.level import Theta
from nestax.cms.update import UpdateConfig

n, B, D, F = 2, 3, 3, 2
RATES = np.array([0.5, 0.2], np.float32)
OPTIMIZERS = ['sgd', 'momentum', 'dgd']


def gradient(seed):
  rng = np.random.default_rng(seed)
  shapes = (n, B, D, F), (n, B, D, F), (n, B, F, D)
  return Theta(*(rng.normal(size=s).astype(np.float32) for s in shapes))


def mask(*rows):
  return jnp.array([b in rows for b in range(B)])


def count(*values):
  return jnp.array(values, jnp.float32)


def close(got, want, atol=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want
  )


def same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


def row(tree, b):
  return jax.tree.map(lambda x: np.asarray(x)[:, b], tree)


class Plain:
  """One level of one sequence; its matrices have the axis of blocks."""

  def __init__(self, cfg):
    self.cfg = cfg
    self.delta = self.moment = self.total = row(gradient(0), 0)
    self.origin = self.origin_total = self.delta
    self.forget()
    self.commits = self.moved = 0

  def forget(self):
    zero = Theta(*(0 * x for x in self.delta))
    self.delta = self.moment = self.total = zero
    self.origin = self.origin_total = zero
    self.count = self.origin_count = 0

  def accumulate(self, grads, count):
    self.total = Theta(*(t + g for t, g in zip(self.total, grads)))
    self.origin_total = Theta(
      *(t + g for t, g in zip(self.origin_total, grads))
    )
    self.count += count
    self.origin_count += count

  def descend(self, weights, total, count, plain=False):
    """(weights after a step, length of the step)."""
    cfg, new, length = self.cfg, [], 0.0
    size = np.sqrt(sum(np.square(t / count).sum((1, 2)) for t in total))
    shrink = np.minimum(1.0, cfg.clip / size)[:, None, None]
    rate = RATES / (1 + RATES) if cfg.optimizer == 'dgd' else RATES
    rate = (RATES if plain else rate)[:, None, None]
    steps = [t / count * shrink for t in total]
    if cfg.optimizer == 'momentum' and not plain:
      steps = [cfg.beta * m + s for m, s in zip(self.moment, steps)]
      self.moment = Theta(*steps)
    new = Theta(*(w - rate * s for w, s in zip(weights, steps)))
    length = np.sqrt(sum(np.square(rate * s).sum() for s in steps))
    return new, length

  def commit(self):
    self.moved = 0.0
    if self.count and all(np.isfinite(t).all() for t in self.total):
      self.delta, self.moved = self.descend(self.delta, self.total, self.count)
      self.commits += 1
    self.total, self.count = Theta(*(np.zeros_like(x) for x in self.total)), 0

  def restart(self):
    if self.origin_count and all(
      np.isfinite(t).all() for t in self.origin_total
    ):
      self.origin, _ = self.descend(
        self.origin, self.origin_total, self.origin_count, plain=True
      )
    self.delta = self.origin
    self.moment = Theta(*(0 * x for x in self.moment))
    self.origin_total = Theta(*(np.zeros_like(x) for x in self.total))
    self.origin_count = 0


def both(optimizer, nested):
  cfg = UpdateConfig(optimizer, beta=0.8, clip=1.0)
  state = levels.init_state(cfg, n, B, D, F, nested)
  return cfg, state, [Plain(cfg) for _ in range(B)]


SCRIPT = [
  ('accumulate', gradient(1), count(3, 2, 3), mask(0, 1, 2)),
  ('accumulate', gradient(2), count(3, 3, 3), mask(0, 2)),
  ('commit', mask(0, 1)),
  ('accumulate', gradient(3), count(3, 1, 3), mask(0, 1, 2)),
  ('forget', mask(2)),
  ('commit', mask(0, 1, 2)),
  ('accumulate', gradient(4), count(3, 3, 3), mask(0, 1, 2)),
  ('commit', mask(0, 2)),
  ('restart', mask(0, 1)),
  ('forget', mask(1)),
  ('commit', mask(1)),  # nothing gathered since the document began
  ('accumulate', gradient(5), count(3, 3, 2), mask(0, 1, 2)),
  ('commit', mask(0, 1, 2)),
  ('restart', mask(2)),
  ('accumulate', gradient(6), count(2, 2, 2), mask(1)),
  ('commit', mask(0, 1, 2)),
]


@pytest.mark.parametrize('nested', [False, True], ids=['', 'nested'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_level_is_the_plain_one_of_each_sequence(optimizer, nested):
  cfg, state, plain = both(optimizer, nested)
  for what, *args in SCRIPT:
    where = args[-1]
    if what in ('commit', 'restart'):
      if what == 'restart' and not nested:
        assert levels.restart(cfg, state, RATES, where) is state
        continue
      state = getattr(levels, what)(cfg, state, RATES, where)
    else:
      state = getattr(levels, what)(state, *args)
    for b in np.flatnonzero(where):
      own = [row(args[0], b), float(args[1][b])] if len(args) > 1 else []
      getattr(plain[b], what)(*own)
    for b in range(B):
      want = plain[b]
      close(row(levels.weights(state), b), want.delta)
      close(row(state.total, b), want.total)
      assert state.count_B[b] == want.count
      assert state.commits_B[b] == want.commits
      np.testing.assert_allclose(state.moved_B[b], want.moved, atol=1e-5)
      if cfg.remembers:
        moment = levels.scaled(state.moment, state.kept_B)
        close(row(moment, b), want.moment)
      if nested:
        close(row(state.origin, b), want.origin)
        close(row(state.origin_total, b), want.origin_total)
        assert state.origin_count_B[b] == want.origin_count


@pytest.mark.parametrize('bad', [np.nan, np.inf], ids=str)
@pytest.mark.parametrize('optimizer', [*OPTIMIZERS, 'muon'])
def test_a_gradient_that_is_not_finite_writes_nothing(optimizer, bad):
  cfg, state, _ = both(optimizer, True)
  every = mask(0, 1, 2)
  state = levels.accumulate(state, gradient(1), count(3, 3, 3), every)
  before = levels.commit(cfg, state, RATES, every)
  grads = gradient(2)
  grads.up_DxF[1, 1, 0, 0] = bad
  state = levels.accumulate(before, grads, count(3, 3, 3), every)
  after = levels.commit(cfg, state, RATES, every)
  same(row(after.delta, 1), row(before.delta, 1))
  if cfg.remembers:
    same(row(after.moment, 1), row(before.moment, 1))
  assert list(after.commits_B) == [2, 1, 2]
  assert after.moved_B[1] == 0 and after.moved_B[0] > 0
  assert np.abs(after.delta[0] - before.delta[0])[:, [0, 2]].min() > 0
  # nothing of it is left for the next commit
  close(
    row(after.total, 1), row(levels.init_state(cfg, n, B, D, F, 1).total, 1)
  )
  again = levels.restart(cfg, after, RATES, every)
  same(row(again.origin, 1), row(before.origin, 1))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(again))


def test_a_gradient_that_is_not_finite_spoils_no_outer_gradient():
  cfg, state, _ = both('momentum', True)
  every = mask(0, 1, 2)
  grads = gradient(2)
  grads.up_DxF[1, 1, 0, 0] = np.nan

  def size(rate_n):
    gathered = levels.accumulate(state, grads, count(3, 3, 3), every)
    done = levels.commit(cfg, gathered, rate_n, every)
    done = levels.restart(cfg, done, rate_n, every)
    return sum(jnp.sum(x) for x in levels.weights(done))

  slope = jax.jit(jax.grad(size))(jnp.asarray(RATES))
  assert np.isfinite(slope).all() and np.abs(slope).min() > 0


def test_a_sequence_that_is_masked_gathers_not_even_an_infinity():
  _, state, _ = both('sgd', True)
  grads = gradient(1)
  grads.up_DxF[:, 1] = np.inf
  got = levels.accumulate(state, grads, count(3, 3, 3), mask(0, 2))
  same(row(got.total, 1), row(state.total, 1))
  same(row(got.origin_total, 1), row(state.origin_total, 1))
  assert list(got.count_B) == [3, 0, 3]


def test_a_commit_with_nothing_gathered_keeps_every_bit():
  cfg, state, _ = both('momentum', False)
  every = mask(0, 1, 2)
  state = levels.accumulate(state, gradient(1), count(3, 3, 3), every)
  before = levels.commit(cfg, state, RATES, every)
  after = levels.commit(cfg, before, RATES, every)
  same((after.delta, after.moment), (before.delta, before.moment))
  assert list(after.commits_B) == [1, 1, 1] and not after.moved_B.any()


def test_a_level_that_has_learned_nothing_adds_nothing():
  for nested in (False, True):
    _, state, _ = both('muon', nested)
    assert not any(x.any() for x in levels.weights(state))
    assert (state.origin is not None) == nested
