"""M3 inside Optax's wrappers, scanned layers, meshes and checkpoints."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nestax.optim import coefficients, m3, matrices, newton_schulz

Numbers = matrices.MuonDimensionNumbers
SLOW = (m3.TimeScale(0.9, 2, 0.5), m3.TimeScale(0.8, 3, 0.25))
TWO_STEPS = coefficients.quintic(2)  # compiles faster than five
NUMBERS = {
  'query': Numbers(1, (2, 3)),
  'out': Numbers((1, 2), 3),
  'up': Numbers(1, 2),
}
SHAPES = {'query': (2, 8, 2, 4), 'out': (2, 2, 4, 8), 'up': (2, 8, 16)}


def draw(seed, shapes=SHAPES):
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return {
    name: jax.random.normal(key, shape)
    for key, (name, shape) in zip(keys, shapes.items())
  }


def make(learning_rate=0.1, dimension_numbers=NUMBERS, layout=None):
  return m3.m3(
    learning_rate,
    0.9,
    0.99,
    SLOW,
    weight_decay=0.1,
    dimension_numbers=dimension_numbers,
    coefficients=TWO_STEPS,
    dtype='float32',
    layout=layout,
  )


def train(tx, params, steps=7, grads_at=draw, donate=True):
  """Steps under jit with donated buffers; gives the last state too."""

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1) if donate else ())
  params = jax.tree.map(jnp.copy, params)
  state = jax.jit(tx.init)(params)
  for t in range(steps):
    params, state = step(params, state, grads_at(t + 100))
  return params, state


@functools.cache
def expected(steps=7):
  return train(make(), draw(0), steps, donate=False)[0]


def assert_close(got, want, atol=2e-5):
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=atol, err_msg=name)


def test_donated_buffers_and_jit_change_nothing():
  tx, params = make(), draw(0)
  state = tx.init(params)
  for t in range(2):
    updates, state = tx.update(draw(t + 100), state, params)
    params = optax.apply_updates(params, updates)
  assert_close(train(make(), draw(0), 2)[0], params)


def test_under_chain_and_a_schedule():
  tx = optax.chain(
    optax.clip_by_global_norm(1e9), make(optax.constant_schedule(0.1))
  )
  assert_close(train(tx, draw(0))[0], expected())


def test_under_inject_hyperparams():
  def everything(params):
    return jax.tree.map(lambda _: True, params)

  tx = optax.inject_hyperparams(m3.m3, static_args=m3.STATIC)(
    learning_rate=0.05,
    b1=0.9,
    b2=0.99,
    slow=SLOW,
    weight_decay=0.1,
    weight_decay_mask=everything,
    dimension_numbers=lambda params: NUMBERS,
    coefficients=TWO_STEPS,
    dtype=jnp.float32,
    slow_dtype=jnp.float32,
  )
  params, state = draw(0), tx.init(draw(0))
  update = jax.jit(tx.update)
  assert {'b1', 'b2', 'eps', 'consistent_rms'} < set(state.hyperparams)
  state.hyperparams['learning_rate'] = jnp.asarray(0.1)
  for t in range(7):
    updates, state = update(draw(t + 100), state, params)
    params = optax.apply_updates(params, updates)
  assert_close(params, expected())


def test_under_multi_transform_with_numbers_for_all_or_for_its_own():
  shapes = SHAPES | {'scale': (2, 8)}
  labels = dict.fromkeys(SHAPES, 'm3') | {'scale': 'adam'}
  for numbers in (NUMBERS, NUMBERS | {'scale': Numbers()}):
    tx = optax.multi_transform(
      {'m3': make(dimension_numbers=numbers), 'adam': optax.adam(1e-2)}, labels
    )
    params = draw(0) | {'scale': jnp.ones((2, 8))}
    got, _ = train(
      tx, params, grads_at=lambda t: draw(t) | {'scale': jnp.ones((2, 8))}
    )
    assert_close({name: got[name] for name in SHAPES}, expected())
    np.testing.assert_allclose(got['scale'], 1 - 7e-2, atol=1e-4)
    assert set(got) == set(shapes)


def test_under_masked_the_rest_passes():
  tx = optax.masked(make(), {'query': True, 'out': False, 'up': True})
  updates, _ = tx.update(draw(100), tx.init(draw(0)), draw(0))
  np.testing.assert_array_equal(updates['out'], draw(100)['out'])
  first = expected(1)
  for name in ('query', 'up'):
    np.testing.assert_allclose(
      draw(0)[name] + updates[name], first[name], atol=2e-5
    )


def test_under_multi_steps_it_sees_the_mean_gradient():
  tx = optax.MultiSteps(make(), every_k_schedule=2)
  tx = tx.gradient_transformation()

  def halves(t):
    t, second = divmod(t - 100, 2)
    sign = 1 if second else -1
    noise = draw(7000 + t)
    return jax.tree.map(lambda g, n: g + sign * n, draw(t + 100), noise)

  assert_close(train(tx, draw(0), 14, halves)[0], expected(), atol=1e-3)


def test_under_apply_if_finite_a_nan_changes_nothing():
  def with_a_nan(t):
    if t == 103:
      return jax.tree.map(lambda x: x * jnp.nan, draw(t))
    return draw(t if t < 103 else t - 1)

  tx = optax.apply_if_finite(make(), max_consecutive_errors=3)
  got, _ = train(tx, draw(0), 8, with_a_nan)
  assert_close(got, expected())


def test_layers_stacked_by_a_scan_are_layers_apart():
  apart = {f'{name}_{i}': x[i] for name, x in draw(0).items() for i in range(2)}
  numbers = {
    'query': Numbers(0, (1, 2)),
    'out': Numbers((0, 1), 2),
    'up': Numbers(0, 1),
  }
  numbers = {name: numbers[name.split('_')[0]] for name in apart}

  def grads_at(t):
    return {f'{n}_{i}': x[i] for n, x in draw(t).items() for i in range(2)}

  got, _ = train(make(dimension_numbers=numbers), apart, grads_at=grads_at)
  for name, want in expected().items():
    for i in range(2):
      np.testing.assert_allclose(got[f'{name}_{i}'], want[i], atol=2e-5)


def test_a_head_axis_of_the_kernel_is_only_a_shape():
  flat = {name: x.reshape(2, 8, -1) for name, x in draw(0).items()}

  def grads_at(t):
    return {name: x.reshape(2, 8, -1) for name, x in draw(t).items()}

  got, _ = train(make(dimension_numbers=None), flat, grads_at=grads_at)
  want = {name: x.reshape(2, 8, -1) for name, x in expected().items()}
  assert_close(got, want)


def assert_same_layout(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


BY_ROWS = {
  'query': P(None, 'data'),
  'out': P(None, None, None, 'data'),
  'up': P(None, 'data'),
}
BY_COLUMNS = {
  'query': P(None, None, 'model'),
  'out': P(None, 'model'),
  'up': P(None, None, 'model'),
}
BY_BOTH = {
  'query': P(None, 'data', 'model'),
  'out': P(None, 'model', None, 'data'),
  'up': P(None, 'data', 'model'),
}


@pytest.mark.parametrize('laid_out', [False, True], ids=['plain', 'laid_out'])
@pytest.mark.parametrize(
  ('shape', 'specs'),
  [((8, 1), BY_ROWS), ((4, 2), BY_COLUMNS), ((4, 2), BY_BOTH)],
  ids=['rows', 'columns', 'both'],
)
def test_a_mesh_of_8_gives_one_device_and_keeps_its_layout(
  shape, specs, laid_out
):
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh(shape, ('data', 'model'), axis_types=auto)

  def put(tree):
    return {
      name: jax.device_put(x, NamedSharding(mesh, specs[name]))
      for name, x in tree.items()
    }

  layout = newton_schulz.Layout(mesh, ('data',), ('model',))
  tx = make(layout=layout if laid_out else None)
  params = put(draw(0))
  whole = NamedSharding(mesh, P())
  state = jax.tree.map(
    lambda x: x if x.ndim else jax.device_put(x, whole), tx.init(params)
  )
  first = jax.tree.map(jnp.copy, state)
  pinned = jax.tree.map(lambda x: x.sharding, (params, state))
  update = jax.jit(tx.update, out_shardings=pinned if laid_out else None)
  for t in range(7):
    updates, state = update(put(draw(t + 100)), state, params)
    params = optax.apply_updates(params, updates)
    assert_same_layout(state, first)
  assert update._cache_size() == 1
  assert_close(params, expected())
  if laid_out and specs is BY_BOTH:
    check_traffic(update.lower(put(draw(0)), state, params).compile().as_text())


def check_traffic(text):
  """No device gathers parameters; each multiplies a share of whole matrices.

  The stacks hold 4 matrices of 8 x 8 and 2 of 8 x 16, on 8 devices.
  """
  assert ' all-gather(' not in text
  sums = re.findall(r'= \(?(.*?)\)? all-reduce\(', text)
  # Norms alone, one for each layer.
  assert {x for s in sums for x in re.findall(r'f32\[[\d,]*\]', s)} == {
    'f32[2]'
  }
  shares = set(re.findall(r' = \w+(\[[\d,]*\])\S* dot\(', text))
  assert shares == {'[8,8]', '[8,16]'}


def test_state_survives_a_checkpoint(tmp_path):
  tx = make()
  params, state = train(tx, draw(0), 4)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', (params, state))
    checkpointer.wait_until_finished()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
    params, state = checkpointer.restore(tmp_path / 'state', abstract)
  update = jax.jit(tx.update)
  for t in range(4, 7):
    updates, state = update(draw(t + 100), state, params)
    params = optax.apply_updates(params, updates)
  assert_close(params, expected())
