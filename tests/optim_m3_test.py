"""M3 against Algorithm 1 in float64 and against Muon, and its options."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestax.optim import coefficients, m3, matrices, rounding

Numbers = matrices.MuonDimensionNumbers
OPTIMUM = np.random.default_rng(7).normal(size=(6, 10))


def gradient(theta, step):
  """Gradient of a badly scaled quadratic, with noise that repeats."""
  noise = np.random.default_rng(step).normal(size=theta.shape)
  return np.geomspace(0.1, 2, 6)[:, None] * (theta - OPTIMUM) + 0.3 * noise


def newton_schulz(x, triples, eps=1e-8):
  x = x / (np.linalg.norm(x) + eps)
  for a, b, c in triples:
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x


def algorithm_1(theta, steps, lr, b1, b2, b3, alpha, eps, every, triples):
  """Transcribes NL's Algorithm 1 line by line, in float64."""
  slow = fast = second = np.zeros_like(theta)
  window, thetas = [], []
  for k in range(steps // every):
    slow = slow + b3 * sum(window, np.zeros_like(theta))
    slow_direction = newton_schulz(slow, triples, eps)
    window = []
    for t in range(k * every, (k + 1) * every):
      g = gradient(theta, t)
      window.append(g)
      fast = fast + b1 * g
      second = second + b2 * g**2
      direction = newton_schulz(fast, triples, eps)
      step = (direction + alpha * slow_direction) / (np.sqrt(second) + eps)
      theta = theta - lr * step
      thetas.append(theta)
  return np.array(thetas)


def run(tx, theta, steps):
  update = jax.jit(tx.update)
  params = {'w': jnp.asarray(theta, jnp.float32)}
  state = tx.init(params)
  thetas = []
  for t in range(steps):
    g = gradient(np.asarray(params['w'], np.float64), t)
    updates, state = update({'w': jnp.asarray(g, jnp.float32)}, state, params)
    params = optax.apply_updates(params, updates)
    thetas.append(params['w'])
  return np.array(thetas), state


@pytest.mark.parametrize('every', [1, 7, 100])
def test_sum_is_algorithm_1_over_300_steps(every):
  steps = 300 if every != 7 else 301
  triples = coefficients.quintic(5)
  theta = np.zeros((6, 10))
  want = algorithm_1(
    theta, steps, 0.05, 0.9, 0.99, 0.5, 0.7, 1e-8, every, triples
  )
  tx = m3.m3(
    0.05,
    0.9,
    0.99,
    (m3.TimeScale(0.5, every, 0.7),),
    accumulate='sum',
    coefficients=triples,
    consistent_rms=None,
    dtype='float32',
  )
  got, _ = run(tx, theta, steps)
  assert np.abs(want[-1]).max() > 0.5
  np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_without_slow_part_and_second_moment_it_is_muon(nesterov, dtype):
  params = {
    'query': jnp.ones((3, 8, 2, 4)),
    'down': jnp.ones((3, 24, 8)),
  }
  numbers = {'query': Numbers(1, (2, 3)), 'down': Numbers(1, 2)}
  ours = m3.m3(
    0.1,
    b1=0.95,
    slow=(),
    weight_decay=0.01,
    nesterov=nesterov,
    dimension_numbers=numbers,
    dtype=dtype,
  )
  muon = optax.contrib.muon(
    0.1,
    weight_decay=0.01,
    nesterov=nesterov,
    muon_weight_dimension_numbers=numbers,
    consistent_rms=0.2,
  )
  states = [tx.init(params) for tx in (ours, muon)]
  updates = [jax.jit(tx.update) for tx in (ours, muon)]
  for step in range(6):
    keys = jax.random.split(jax.random.key(step), 2)
    grads = {
      name: jax.random.normal(key, x.shape)
      for key, (name, x) in zip(keys, params.items())
    }
    (a, states[0]), (b, states[1]) = (
      update(grads, state, params) for update, state in zip(updates, states)
    )
    tolerance = 1e-4 if dtype == 'float32' else 5e-2
    for name in params:
      error = jnp.linalg.norm(a[name] - b[name]) / jnp.linalg.norm(b[name])
      assert error < tolerance


def test_ema_weighs_windows_by_their_means():
  every, beta = 4, 0.8
  tx = m3.scale_by_m3(slow=((beta, every, 0.5),))
  params = {'w': jnp.zeros((3, 5))}
  state, want, window = tx.init(params), np.zeros((3, 5)), []
  update = jax.jit(tx.update)
  for t in range(12):
    g = np.random.default_rng(t).normal(size=(3, 5)).astype(np.float32)
    window.append(g)
    if t % every == every - 1:
      want = beta * want + (1 - beta) * np.mean(window, 0)
      window = []
    _, state = update({'w': jnp.asarray(g)}, state)
  np.testing.assert_allclose(state.slow[0]['w'], want, atol=1e-6)


def test_ema_of_three_time_scales_is_its_transcription_in_float64():
  slow, b1, b2 = ((0.9, 1, 0.5), (0.8, 2, 0.2), (0.7, 3, 0.1)), 0.9, 0.99
  tx = m3.scale_by_m3(b1, b2, slow, dtype='float32')
  state, update = tx.init({'w': jnp.zeros((4, 6))}), jax.jit(tx.update)
  fast = second = np.zeros((4, 6))
  momenta, directions, grads = [fast] * 3, [fast] * 3, []
  for t in range(1, 13):
    grads.append(np.random.default_rng(t).normal(size=(4, 6)))
    g = grads[-1]
    got, state = update({'w': jnp.asarray(g, jnp.float32)}, state)
    fast = b1 * fast + (1 - b1) * g
    second = b2 * second + (1 - b2) * g**2
    want = newton_schulz(fast, coefficients.MUON)
    want = want + sum(a * o for (_, _, a), o in zip(slow, directions))
    want = want / (np.sqrt(second / (1 - b2**t)) + 1e-8)
    np.testing.assert_allclose(got['w'], want, atol=1e-4 * abs(want).max())
    for i, (beta, every, _) in enumerate(slow):
      if t % every == 0:
        mean = np.mean(grads[-every:], 0)
        momenta[i] = beta * momenta[i] + (1 - beta) * mean
        directions[i] = newton_schulz(momenta[i], coefficients.MUON)


def test_directions_change_only_at_the_end_of_their_window():
  tx = m3.scale_by_m3(slow=((0.9, 3, 0.5), (0.9, 6, 0.2)))
  params = {'w': jnp.zeros((4, 4))}
  state, changed = tx.init(params), []
  update = jax.jit(tx.update)
  for t in range(12):
    g = {'w': jax.random.normal(jax.random.key(t), (4, 4))}
    _, new = update(g, state)
    changed.append(
      [
        bool(jnp.any(a['w'] != b['w']))
        for a, b in zip(new.directions, state.directions)
      ]
    )
    state = new
  assert [c[0] for c in changed] == [False, False, True] * 4
  assert [c[1] for c in changed] == ([False] * 5 + [True]) * 2


def test_between_windows_newton_schulz_runs_for_the_fast_part_only():
  tx = m3.scale_by_m3(slow=((0.9, 10, 0.5),))
  params = {'w': jnp.zeros((4, 8))}
  jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params))
  outside = [str(e.primitive) for e in jaxpr.eqns]
  conds = [e for e in jaxpr.eqns if str(e.primitive) == 'cond']
  assert outside.count('dot_general') == 3 * 5
  assert len(conds) == 1
  products = [str(b).count('dot_general') for b in conds[0].params['branches']]
  assert sorted(products) == [0, 3 * 5]


def test_the_first_window_has_no_slow_direction_and_the_next_has():
  params = {'w': jnp.zeros((4, 6))}
  slow = m3.scale_by_m3(slow=((0.9, 3, 0.5),))
  fast = m3.scale_by_m3(slow=())
  states = [slow.init(params), fast.init(params)]
  step_slow, step_fast = jax.jit(slow.update), jax.jit(fast.update)
  for t in range(4):
    g = {'w': jax.random.normal(jax.random.key(t), (4, 6))}
    a, states[0] = step_slow(g, states[0])
    b, states[1] = step_fast(g, states[1])
    assert np.array_equal(a['w'], b['w']) == (t < 3)


@pytest.mark.parametrize('b2', [None, 0.99])
@pytest.mark.parametrize('shape', [(32, 16), (16, 128), (2, 64, 64)])
@pytest.mark.parametrize('scale', [1e-4, 1e4])
def test_updates_have_the_rms_asked_for_at_every_width(b2, shape, scale):
  tx = m3.scale_by_m3(b2=b2, slow=(), consistent_rms=0.2)
  g = {'w': scale * jax.random.normal(jax.random.key(0), shape)}
  updates = jax.jit(lambda g: tx.update(g, tx.init(g))[0])(g)
  rms = float(np.sqrt(np.mean(np.square(updates['w']))))
  # Muon's quintic leaves singular values around 0.9.
  assert 0.15 < rms < 0.22 if b2 is None else abs(rms - 0.2) < 2e-3


def test_slow_parts_never_make_a_step_longer_than_muons():
  tx = m3.scale_by_m3(slow=((0.9, 2, 1.0), (0.9, 4, 2.0)), consistent_rms=0.2)
  g = {'w': jax.random.normal(jax.random.key(0), (16, 16))}
  state, update = tx.init(g), jax.jit(tx.update)
  for _ in range(10):
    updates, state = update(g, state)
  largest = np.linalg.svd(updates['w'], compute_uv=False).max()
  assert largest <= 1.25 * 0.2 * 4


def test_bfloat16_slow_momentum_keeps_small_gradients():
  tx = m3.scale_by_m3(slow=((0.99, 100, 0.5),), slow_dtype='bfloat16')
  # A large gradient first, then small ones below its rounding.
  params = {'w': jnp.zeros((32, 32))}
  state = tx.init(params)
  update = jax.jit(tx.update)
  _, state = update({'w': jnp.full((32, 32), 100.0)}, state)
  for _ in range(99):
    _, state = update({'w': jnp.ones((32, 32))}, state)
  assert state.slow[0]['w'].dtype == jnp.bfloat16
  got = state.slow[0]['w'].astype(jnp.float32).mean()
  np.testing.assert_allclose(got, (1 - 0.99) * 1.99, rtol=5e-3)


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
  x = jnp.full((64, 64), 1 + 1 / 1024)
  rounded = rounding.to_bfloat16(x, 3).astype(jnp.float32)
  assert set(np.unique(rounded)) == {1.0, 1.0078125}
  np.testing.assert_allclose(rounded.mean(), x[0, 0], atol=2e-4)
  exact = jnp.array([0.0, -2.5, jnp.inf, jnp.nan])
  kept = rounding.to_bfloat16(exact, 0).astype(jnp.float32)
  np.testing.assert_array_equal(kept, exact)
  assert jnp.any(rounded != rounding.to_bfloat16(x, 4).astype(jnp.float32))


def test_stochastic_rounding_is_the_same_on_every_mesh():
  x = jax.random.normal(jax.random.key(0), (16, 8))
  want = rounding.to_bfloat16(x, 5)
  mesh = jax.make_mesh((4, 2), ('data', 'model'))
  spec = jax.sharding.PartitionSpec('data', 'model')
  x = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
  got = jax.jit(rounding.to_bfloat16)(x, 5)
  np.testing.assert_array_equal(
    np.asarray(got, np.float32), np.asarray(want, np.float32)
  )


@pytest.mark.parametrize(
  ('slow_dtype', 'b2', 'bytes_each'),
  [
    ('float32', None, 10),
    ('bfloat16', None, 8),
    ('bfloat16', 0.99, 12),
  ],
)
def test_state_is_as_small_as_the_docstring_says(slow_dtype, b2, bytes_each):
  tx = m3.scale_by_m3(b2=b2, slow_dtype=slow_dtype)
  state = jax.eval_shape(tx.init, {'w': jnp.zeros((128, 256))})
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert total == 128 * 256 * bytes_each + 4


def test_strict_dtypes_and_gradient_dtype():
  tx = m3.scale_by_m3(
    b2=0.9, slow_dtype='bfloat16', nesterov=True, consistent_rms=0.2
  )
  params = {'w': jnp.ones((4, 8), jnp.bfloat16)}
  with jax.numpy_dtype_promotion('strict'):
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
  assert updates['w'].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ({'accumulate': 'mean'}, "'mean'.*ema, sum"),
    ({'accumulate': 'sum', 'nesterov': True}, 'nesterov'),
    ({'slow': ((0.9, 0, 0.5),)}, 'every is 0: .*whole number, 1 or above'),
    ({'slow': ((0.9, 2.5, 0.5),)}, 'every is 2.5'),
    ({'slow': ((0.9, True, 0.5),)}, 'every is True'),
    ({'slow': ((0.9, 2), (1.0, 2))}, 'slow momentum 1, beta is 1.0'),
    ({'slow': ((0.9, 2, float('nan')),)}, 'alpha is nan'),
    ({'slow': m3.TimeScale(0.9, 2, 0.5)}, 'a sequence of TimeScale'),
    ({'b1': float('nan')}, 'b1 is nan: it has to be 0 or above, and below 1'),
    ({'b1': 1.0}, 'b1 is 1.0'),
    ({'b1': '0.9?'}, 'b1 is .0.9..'),
    ({'b1': '0.9'}, 'b1 is .0.9.:'),
    ({'eps': '1e-8'}, 'eps is .1e-8.:'),
    ({'b2': -0.1}, 'b2 is -0.1'),
    ({'b2': jnp.asarray(1.5)}, 'b2 is .*1.5'),
    ({'accumulate': 'sum', 'b1': float('inf')}, 'b1 is inf: .*and finite'),
    ({'consistent_rms': 0.0}, 'consistent_rms is 0.0: it has to be above 0'),
    ({'eps': 0.0}, 'eps is 0.0'),
    ({'dtype': 'int32'}, "dtype is 'int32'.*bfloat16, float32"),
    ({'slow_dtype': 'int8'}, 'slow_dtype'),
    ({'slow_dtype': 'float17'}, "slow_dtype is 'float17'"),
    ({'learning_rate': float('nan')}, 'learning_rate is nan'),
    ({'weight_decay': -0.1}, 'weight_decay is -0.1'),
    ({'coefficients': ()}, r'coefficients are \(\).*triples'),
    ({'coefficients': ((1.5, float('nan'), 0.0),)}, 'triples'),
    ({'coefficients': ((1.5, 0.5),)}, 'triples'),
  ],
)
def test_arguments_out_of_range_are_refused(arguments, words):
  errors = m3.M3Error, coefficients.CoefficientError
  with pytest.raises(errors, match=words):
    m3.m3(**{'learning_rate': 0.1} | arguments)


@pytest.mark.parametrize('accumulate', ['ema', 'sum'])
def test_any_size_of_a_factor_will_do_in_a_sum(accumulate):
  arguments = {'b1': 1.5, 'b2': 1.0, 'slow': ((2.0, 3, 0.5),)}
  if accumulate == 'sum':
    m3.scale_by_m3(accumulate=accumulate, **arguments)
  else:
    with pytest.raises(m3.M3Error):
      m3.scale_by_m3(accumulate=accumulate, **arguments)


@pytest.mark.parametrize('b2', [None, 0.9])
def test_zero_gradients_and_empty_matrices_stay_finite(b2):
  tx = m3.scale_by_m3(b2=b2, slow=((0.9, 1, 0.5),), consistent_rms=0.2)
  params = {'zero': jnp.zeros((3, 4)), 'none': jnp.zeros((2, 0, 4))}
  state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
  for _ in range(2):
    updates, state = update(params, state)
  np.testing.assert_array_equal(updates['zero'], 0.0)
  assert updates['none'].shape == (2, 0, 4)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize('slow', [((0.9, 2, 0.5),) * 2, ()])
@pytest.mark.parametrize('b2', [None, 0.9])
def test_a_state_of_other_moments_is_refused(slow, b2):
  params = {'w': jnp.ones((4, 6))}
  state = m3.scale_by_m3(b2=0.9, slow=((0.9, 2, 0.5),)).init(params)
  tx = m3.scale_by_m3(b2=b2, slow=slow)
  words = f'has 1 slow momenta and a second.* {len(slow)} slow'
  with pytest.raises(m3.M3Error, match=words):
    tx.update(params, state)


def test_a_huge_gradient_makes_a_step_like_any_other():
  tx = m3.scale_by_m3(slow=((0.9, 1, 0.5),), dtype='float32')
  g = {'w': jax.random.normal(jax.random.key(0), (4, 6))}
  results = []
  for scale in (1.0, 1e25):
    scaled, state = {'w': scale * g['w']}, tx.init(g)
    for _ in range(2):
      updates, state = tx.update(scaled, state)
    results.append(updates['w'])
  np.testing.assert_allclose(results[1], results[0], atol=1e-3)
