"""Delta and deep momentum against their equations and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestax.optim import coefficients, m3, matrices, momentum, newton_schulz

Numbers = matrices.MuonDimensionNumbers


def draws(steps, shape=(5, 3)):
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape).astype(np.float32) for _ in range(steps)]


def run(tx, grads):
  state, out = tx.init({'w': jnp.zeros_like(grads[0])}), None
  update = jax.jit(tx.update)
  for g in grads:
    out, state = update({'w': jnp.asarray(g)}, state)
  return out['w'], state


@pytest.mark.parametrize('normalize', [False, True])
def test_delta_momentum_is_equation_49_in_its_own_layout(normalize):
  alpha, eta = 0.9, 0.3
  grads = [0.2 * g for g in draws(20)]
  m = np.zeros((3, 5))  # NL's layout, [out, in]
  for g in grads:
    g = g.T.astype(np.float64)
    key = g / np.linalg.norm(g) if normalize else g
    m = m @ (alpha * np.eye(5) - key.T @ key) - eta * g
  tx = momentum.scale_by_delta_momentum(alpha, eta, normalize=normalize)
  got, _ = run(tx, grads)
  np.testing.assert_allclose(got, -m.T, atol=1e-5)


def test_dot_is_heavy_ball_momentum():
  got, _ = run(momentum.scale_by_delta_momentum(objective='dot'), draws(10))
  want, _ = run(optax.trace(0.9), draws(10))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_dot_with_newton_schulz_is_muon():
  output = functools.partial(newton_schulz.orthogonalize, dtype=jnp.float32)
  tx = momentum.scale_by_delta_momentum(0.9, objective='dot', output=output)
  muon = m3.scale_by_m3(
    0.9, slow=(), coefficients=coefficients.MUON, dtype='float32'
  )
  got, _ = run(tx, draws(10))
  want, _ = run(muon, draws(10))
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_features_act_on_what_is_written_and_precondition_before_them():
  tx = momentum.scale_by_delta_momentum(
    0.5,
    objective='dot',
    features=jnp.sign,
    precondition=optax.scale(-1.0),
  )
  grads = draws(3)
  want = sum(-(0.5 ** (2 - i)) * np.sign(g) for i, g in enumerate(grads))
  got, _ = run(tx, grads)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_delta_momentum_keeps_orthogonal_directions_and_rewrites_its_own():
  u, v = np.eye(4)[0], np.eye(4)[1]
  a = np.outer(u, np.ones(3)).astype(np.float32)
  b = np.outer(v, np.ones(3)).astype(np.float32)
  tx = momentum.scale_by_delta_momentum(alpha=1.0)
  after_a, _ = run(tx, [a])
  after_b, _ = run(tx, [a, b, b, b])
  np.testing.assert_allclose(after_b[0], after_a[0], atol=1e-6)
  np.testing.assert_allclose(after_b[1], 1.0, atol=1e-6)  # not 3


def test_delta_momentum_stays_bounded_on_large_gradients():
  got, _ = run(
    momentum.scale_by_delta_momentum(0.99), [100 * g for g in draws(500)]
  )
  assert jnp.all(jnp.isfinite(got)) and jnp.max(jnp.abs(got)) < 1e5


def test_stacked_layers_are_layers_apart():
  grads = draws(5, (2, 5, 3, 2))
  make = momentum.scale_by_delta_momentum
  whole, _ = run(make(dimension_numbers={'w': Numbers(1, (2, 3))}), grads)
  one = {'w': Numbers(0, (1, 2))}
  for i in range(2):
    part, _ = run(make(dimension_numbers=one), [g[i] for g in grads])
    np.testing.assert_allclose(whole[i], part, atol=1e-5)


def test_a_stack_of_deep_memories_is_its_memories_one_by_one():
  grads = draws(5, (2, 5, 3))
  tx = momentum.scale_by_deep_momentum(4)
  update = jax.jit(tx.update)
  whole = tx.init({'w': grads[0]})
  parts = [
    tx.init({'w': grads[0][i]})._replace(
      initial={'w': whole.initial['w'][i : i + 1]}
    )
    for i in range(2)
  ]
  for g in grads:
    got, whole = update({'w': g}, whole)
    for i in range(2):
      want, parts[i] = update({'w': g[i]}, parts[i])
      np.testing.assert_allclose(got['w'][i], want['w'], atol=1e-5)
  assert jnp.max(jnp.abs(got['w'])) > 1e-2


def test_deep_momentum_takes_the_printed_step_on_its_objective():
  g = draws(1)[0]
  alpha, eta = 0.8, 0.5
  tx = momentum.scale_by_deep_momentum(
    4, alpha, eta, objective=lambda y, v: -jnp.sum(y), activation=jnp.tanh
  )
  got, state = run(tx, [g])
  first = np.asarray(state.initial['w'][0])
  norm = np.sqrt(np.mean(np.sum(g**2, -1)))
  keys = g / norm
  h = np.tanh(keys @ first)
  second = eta * np.outer(h.mean(0), np.ones(3))  # of a memory born zero
  np.testing.assert_allclose(state.second['w'][0], second, atol=1e-5)
  np.testing.assert_allclose(got, norm * h @ second, atol=1e-5)


def test_deep_momentum_recalls_what_came_often_and_less_what_is_new():
  rng = np.random.default_rng(1)
  base = rng.normal(size=(2, 16))
  grads = [
    (rng.normal(size=(8, 2)) @ base).astype(np.float32) for _ in range(200)
  ]
  new = rng.normal(size=(8, 16)).astype(np.float32)
  new -= new @ np.linalg.pinv(base) @ base
  tx = momentum.scale_by_deep_momentum(32, alpha=0.99, eta=0.5)

  def recalled(last):
    out, _ = run(tx, [*grads, last])
    return float(jnp.vdot(out, last) / np.vdot(last, last))

  assert recalled(grads[0]) > 0.7
  assert recalled(new) < 0.5 * recalled(grads[0])


@pytest.mark.parametrize(
  'make',
  [
    lambda: momentum.scale_by_delta_momentum(0.9),
    lambda: momentum.scale_by_deep_momentum(16),
    lambda: momentum.scale_by_deep_momentum(
      16, output=newton_schulz.orthogonalize
    ),
  ],
  ids=['delta', 'deep', 'deep_muon'],
)
def test_they_train_a_linear_layer(make):
  rng = np.random.default_rng(2)
  x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
  y = x @ jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)

  def loss(params):
    return jnp.mean((x @ params['w'] - y) ** 2)

  tx = optax.chain(
    make(), optax.scale_by_learning_rate(optax.linear_schedule(0.2, 0, 300))
  )
  params = {'w': jnp.zeros((8, 4))}

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state)
    return (optax.apply_updates(params, updates), state), value

  _, losses = jax.lax.scan(step, (params, tx.init(params)), length=300)
  assert losses[-1] < 0.05 * losses[0]


def test_state_keeps_its_shapes_and_dtypes_for_bfloat16():
  for tx in (
    momentum.scale_by_delta_momentum(),
    momentum.scale_by_deep_momentum(4),
  ):
    g = {'w': jnp.ones((3, 5), jnp.bfloat16)}
    state = tx.init(g)
    out, new = jax.jit(tx.update)(g, state)
    assert out['w'].dtype == jnp.bfloat16
    jax.tree.map(
      lambda a, b: np.testing.assert_equal(
        (a.shape, a.dtype), (b.shape, b.dtype)
      ),
      state,
      new,
    )


DELTA, DEEP = momentum.scale_by_delta_momentum, momentum.scale_by_deep_momentum


@pytest.mark.parametrize(
  ('make', 'arguments', 'words'),
  [
    (DELTA, {'objective': 'l1'}, "'l1'.*l2, dot"),
    (DELTA, {'alpha': float('nan')}, 'alpha is nan: .*at most 1'),
    (DELTA, {'eta': -1.0}, 'eta is -1.0'),
    (DEEP, {'alpha': 1.01}, 'alpha is 1.01'),
    (DEEP, {'eta': float('inf')}, 'eta is inf'),
    (DEEP, {'hidden': 0}, 'hidden is 0: .*whole number, 1 or above'),
    (DEEP, {'hidden': 2.5}, 'hidden is 2.5'),
    (DEEP, {'hidden': jnp.asarray(4)}, 'name it in static_args'),
    (DEEP, {'seed': -1}, 'seed is -1'),
  ],
)
def test_arguments_out_of_range_are_refused(make, arguments, words):
  with pytest.raises(momentum.MomentumError, match=words):
    make(**arguments)


@pytest.mark.parametrize(
  ('make', 'static', 'arguments'),
  [
    (DELTA, momentum.DELTA_STATIC, {'alpha': 0.8, 'output': jnp.sign}),
    (DEEP, momentum.DEEP_STATIC, {'alpha': 0.8, 'hidden': 4}),
  ],
  ids=['delta', 'deep'],
)
def test_under_inject_hyperparams_numbers_can_be_set(make, static, arguments):
  grads = [{'w': jnp.asarray(g)} for g in draws(3)]
  tx = optax.inject_hyperparams(make, static_args=static)(**arguments)
  same = make(**arguments | {'alpha': 0.3})
  state, same_state = tx.init(grads[0]), same.init(grads[0])
  state.hyperparams['alpha'] = jnp.asarray(0.3)
  update, same_update = jax.jit(tx.update), jax.jit(same.update)
  for g in grads:
    got, state = update(g, state)
    want, same_state = same_update(g, same_state)
  np.testing.assert_allclose(got['w'], want['w'], atol=1e-5)


@pytest.mark.parametrize('make', [DELTA, DEEP], ids=['delta', 'deep'])
def test_huge_zero_and_empty_gradients_stay_finite(make):
  grads = {
    'huge': jnp.full((2, 3), 1e25),
    'zero': jnp.zeros((2, 3)),
    'rows': jnp.zeros((0, 3)),
    'columns': jnp.zeros((2, 0)),
  }
  tx = make()
  state, update = jax.jit(tx.init)(grads), jax.jit(tx.update)
  for _ in range(2):
    out, state = update(grads, state)
  assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, grads)
  for x in jax.tree.leaves((out, state)):
    assert np.isfinite(x).all()
  assert np.all(out['zero'] == 0) and np.all(out['huge'] != 0)
