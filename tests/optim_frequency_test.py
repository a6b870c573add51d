"""Groups of parameters that update every n steps with what they gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestax.optim import dgd, frequency, m3


def draw(seed):
  return {
    'w': jax.random.normal(jax.random.key(seed), (4, 6)),
    'b': jax.random.normal(jax.random.key(1000 + seed), (6,)),
  }


def run(tx, grads):
  params = draw(999)
  state, history = tx.init(params), []
  update = jax.jit(tx.update)
  for g in grads:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
    history.append(params)
  return history, state


def assert_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


@pytest.mark.parametrize('reduce', ['mean', 'sum'])
@pytest.mark.parametrize('every', [1, 3])
def test_it_is_the_inner_optimiser_on_gathered_gradients(every, reduce):
  grads = [draw(t) for t in range(12)]
  got, _ = run(frequency.at_frequency(optax.adam(0.1), every, reduce), grads)
  windows = [grads[i : i + every] for i in range(0, 12, every)]
  scale = 1 / every if reduce == 'mean' else 1.0
  gathered = [
    jax.tree.map(lambda *g: scale * sum(g), *window) for window in windows
  ]
  want, _ = run(optax.adam(0.1), gathered)
  assert_close(got[every - 1 :: every], want)


def test_between_updates_nothing_moves_by_a_bit():
  grads = [draw(t) for t in range(9)]
  history, _ = run(frequency.at_frequency(optax.adam(0.1), 4), grads)
  moved = [
    bool(jnp.any(a['w'] != b['w']))
    for a, b in zip(history, [draw(999), *history])
  ]
  assert moved == [False, False, False, True] * 2 + [False]


def test_groups_have_their_own_frequencies():
  tx = optax.multi_transform(
    {
      'fast': optax.sgd(0.1),
      'slow': frequency.at_frequency(m3.m3(0.1), 2),
    },
    {'w': 'slow', 'b': 'fast'},
  )
  history, _ = run(tx, [draw(t) for t in range(4)])
  assert bool(jnp.all(history[0]['w'] == draw(999)['w']))
  assert bool(jnp.any(history[0]['b'] != draw(999)['b']))
  assert bool(jnp.any(history[1]['w'] != history[0]['w']))


def test_frequencies_nest():
  grads = [draw(t) for t in range(12)]
  nested = frequency.at_frequency(frequency.at_frequency(optax.sgd(0.1), 2), 3)
  got, _ = run(nested, grads)
  want, _ = run(frequency.at_frequency(optax.sgd(0.1), 6), grads)
  assert_close(got, want)


def test_schedules_count_updates():
  tx = frequency.at_frequency(optax.sgd(optax.linear_schedule(1, 0, 2)), 2)
  ones = jax.tree.map(jnp.ones_like, draw(0))
  history, _ = run(tx, [ones] * 4)
  np.testing.assert_allclose(
    history[3]['b'], draw(999)['b'] - 1 - 0.5, atol=1e-6
  )


def test_state_keeps_its_dtypes_for_bfloat16_gradients():
  tx = frequency.at_frequency(optax.adam(0.1), 2)
  g = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw(0))
  before = tx.init(g)
  updates, after = tx.update(g, before, g)
  dtypes = [jax.tree.map(lambda x: x.dtype, s) for s in (before, after)]
  assert dtypes[0] == dtypes[1]
  assert updates['w'].dtype == jnp.bfloat16


def test_extra_arguments_reach_the_inner_optimiser():
  def update(updates, state, params=None, *, factor):
    return jax.tree.map(lambda u: factor * u, updates), state

  inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
  tx = frequency.at_frequency(inner, 1)
  updates, _ = tx.update(draw(0), tx.init(draw(0)), factor=3.0)
  np.testing.assert_allclose(updates['w'], 3 * draw(0)['w'], rtol=1e-6)


def test_extra_arguments_of_one_step_are_refused_for_several():
  params = {'w': jnp.ones((4, 6))}
  inputs = {'w': jnp.ones((2, 4))}
  tx = frequency.at_frequency(dgd.dgd(0.1), 3)
  with pytest.raises(frequency.FrequencyError, match='inputs are of one.* 3'):
    tx.update(params, tx.init(params), params, inputs=inputs)
  tx = frequency.at_frequency(dgd.dgd(0.1), 3, last=('inputs',))
  state = tx.init(params)
  for number in range(1, 4):
    updates, state = tx.update(
      params, state, params, inputs={'w': number * inputs['w']}
    )
  want = dgd.proximal(params['w'], params['w'], 3 * inputs['w'], 0.1)
  np.testing.assert_allclose(params['w'] + updates['w'], want, atol=1e-5)


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ((0,), 'every is 0'),
    ((1.5,), 'every is 1.5'),
    ((True,), 'every is True'),
    ((2, 'max'), "'max'.*mean, sum"),
  ],
)
def test_arguments_out_of_range_are_refused(arguments, words):
  with pytest.raises(frequency.FrequencyError, match=words):
    frequency.at_frequency(optax.sgd(0.1), *arguments)
