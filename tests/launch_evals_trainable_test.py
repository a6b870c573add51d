"""What is trained: matrices decay, rates fall, rows and tokens are scored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from echo_cases import PROBLEM, TRAINING, echo

from nestax.launch.evals import entrants, trainable
from nestax.optim import schedules


def test_the_first_steps_read_as_many_shorter_rows_as_are_as_long():
  def short(rng, rows):
    return {name: x[:, 4:] for name, x in echo(rng, rows).items()}

  problem = PROBLEM._replace(early=(echo, short), share=0.5)
  cfg = entrants.config('transformer', TRAINING.base(8))
  training = dataclasses.replace(TRAINING, evaluations=8)
  task = trainable.make_task(problem, cfg, training, 2)
  assert task.plan(40, 5) == [0, 0, 1, 1, 2, 2, 2, 2]
  for seed, step in ((0, 0), (1, 9)):
    parts = [part.batch(task.data, seed, step) for part in task.parts()]
    shapes = [part['tokens'].shape for part in parts]
    assert shapes == [(8, 6), (24, 2), (8, 6)]
    assert (parts[0]['tokens'] != parts[2]['tokens']).any()
  order = np.asarray(task.data['early 1 order'])
  # as many as there are of the others, all of them before one is read again
  assert sorted(order[0, 10:20].reshape(-1)[:180]) == list(range(180))
  assert len(task.data['early 1']['tokens']) == 180


def test_what_is_measured_every_time_is_what_is_measured_at_the_end():
  cfg = entrants.config('transformer', TRAINING.base(8))
  said = []
  for best in ('', 'valid'):
    training = dataclasses.replace(TRAINING, best=best)
    task = trainable.make_task(PROBLEM, cfg, training, 1)
    params = jax.jit(task.init)(task.data, 0)
    steps = (20, 40) if best else (40,)  # before, only by the second
    evaluate = jax.jit(task.evaluate)
    said += [evaluate(task.data, params, 0, step) for step in steps]
  assert said[0].keys() >= {'valid', 'loss', 'test rows', 'loss again'}
  for name, x in said[0].items():
    np.testing.assert_allclose([said[1][name], said[2][name]], x, rtol=1e-6)
  losses = {float(said[0][f'loss {name}']) for name in PROBLEM.tests}
  assert len({*losses, float(said[0]['loss'])}) == 3  # all are other rows


def test_scores_of_rows_and_of_tokens():
  logits = jax.nn.one_hot(jnp.array([[1, 2, 3], [1, 2, 0], [0, 0, 0]]), 4)
  batch = {
    'targets': jnp.array([[1, 2, 0], [1, 1, 0], [0, 0, 0]]),
    'weights': jnp.array([[1.0, 1, 0], [0.1, 1, 1], [0, 0, 0]]),
  }
  assert [*map(float, trainable.whole_rows(logits, batch))] == [1, 2]
  assert [*map(float, trainable.tokens_right(logits, batch))] == [4, 5]


def test_only_matrices_decay():
  cfg = entrants.config('hope', TRAINING.base(8))
  shapes = jax.eval_shape(
    trainable.language(cfg).init,
    jax.random.key(0),
    jnp.zeros((1, 1), jnp.int32),
  )
  training = dataclasses.replace(TRAINING, decay=0.5)
  tx = trainable.optimizer(shapes, training)(1.0)
  params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
  zeros = jax.tree.map(jnp.zeros_like, params)

  @jax.jit
  def run():
    state = tx.init(params)
    for _ in range(5):  # the warm-up begins at 0
      updates, state = tx.update(zeros, state, params)
    return updates

  updates = run()
  block = updates['blocks']['mixer']
  assert (block['key']['kernel'] < 0).all()
  assert not block['norm']['scale'].any()
  assert not block['initial']['eta_bias'].any()


def test_a_trial_has_a_whole_schedule_of_its_own():
  training = dataclasses.replace(
    TRAINING, decay=0.0, apart=True, steps=40, trial=10
  )
  params = {'kernel': jnp.ones((2, 2))}
  make = trainable.optimizer(params, training)

  @jax.jit
  def sizes(steps):
    tx = make(0.5, steps)

    def step(state, _):
      updates, state = tx.update(params, state, params)
      return state, -updates['kernel'][0, 0]  # Adam's size is the rate's

    return jax.lax.scan(step, tx.init(params), length=10)[1]

  for steps in (40, 10):
    schedule = schedules.warmup_cosine(0.5, steps // 10, steps)
    want = [schedule(count) for count in range(10)]
    np.testing.assert_allclose(sizes(steps), want, rtol=1e-4)


def test_a_training_may_begin_at_its_peak_and_end_at_any_rate():
  def rates(**changes):
    training = dataclasses.replace(TRAINING, decay=0.0, **changes)
    tx = trainable.optimizer({'w': jnp.ones(2)}, training)(1.0)
    params = {'w': jnp.ones(2)}
    state, found = tx.init(params), []
    for _ in range(training.steps):
      updates, state = tx.update({'w': jnp.ones(2)}, state, params)
      found.append(float(-updates['w'][0]))
    return found

  # of a constant gradient AdamW's step is the rate
  usual, changed = rates(), rates(warmup=0.0, final=0.5)
  assert usual[0] == pytest.approx(1 / 4, rel=1e-4)
  assert usual[-1] == pytest.approx(0.1, abs=0.01)
  assert changed[0] == pytest.approx(1.0, rel=1e-4)
  assert changed[-1] == pytest.approx(0.5, abs=0.01)
