"""The objective on tables of logits, where everything can be counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases
from sleep_cases import W, table

from nestax.sleep import distributions, objective
from nestax.sleep import reader as readers
from nestax.sleep.objective import SeedConfig, Side


def test_leave_one_out_is_unbiased():
  # one word, paid by a table: the gradient of the expected pay is known
  pay_W = jnp.array([0.0, 1.0, 0.3, 0.0])
  logits_W = jnp.array([0.3, -0.5, 1.0, 0.0])
  cfg = SeedConfig(alpha=0.0, group=4)
  B = 80_000
  reader = cases.table_reader()
  params = jnp.broadcast_to(logits_W, (W, W))
  ones = jnp.ones((B,), jnp.int32)
  prompts = readers.Said(jnp.zeros((B, 2), jnp.int32), ones, ones)
  said = jax.jit(functools.partial(readers.sample, reader))(
    params, None, prompts, jax.random.key(0)
  )
  heard = objective.Heard(None, None, pay_W[said.tokens_BxL[:, 1]])

  def value(params):
    return objective.loss(cfg, reader, Side(params, None), None, said, heard)[0]

  got = -jax.jit(jax.grad(value))(params)[0]
  want = jax.grad(lambda x: jax.nn.softmax(x) @ pay_W)(logits_W)
  np.testing.assert_allclose(got, want, atol=4e-3)


def test_the_reward_follows_the_chance_that_was_drawn_with():
  cfg = SeedConfig(alpha=0.0, group=2, temperature=2.0)
  tokens, ones = jnp.array([[0, 1], [0, 2]]), jnp.ones(2, int)
  said = readers.Said(tokens, ones, 2 * ones)
  heard = objective.Heard(None, None, jnp.array([1.0, 0.0]))
  side = Side(table(0), None)
  got, _ = objective.loss(cfg, cases.table_reader(), side, None, said, heard)
  logs = jax.nn.log_softmax(table(0)[0] / 2.0)
  np.testing.assert_allclose(got, -(logs[1] - logs[2]) / 2, rtol=1e-5)


@pytest.mark.parametrize('speaks', [True, False])
def test_the_parts_of_the_objective_have_their_weights(speaks):
  cfg = SeedConfig(alpha=0.7, on_policy=0.4, keep=3.0, group=2)
  reader, tables = cases.table_reader(), {'texts': 0, 'said': 0, 'kept': 2}
  rows, heard, apart = {}, {}, {}

  @jax.jit
  def told(teacher, own, tokens):
    of, by = (readers.score(reader, x, None, tokens) for x in (teacher, own))
    return of, distributions.divergence('reverse_kl', of, by)

  for i, (name, teacher) in enumerate(tables.items()):
    tokens, length = cases.tokens(4, 6, i) % W, np.array([6, 3, 5, 4])
    rows[name] = readers.Said(tokens, np.ones(4, int), length)
    heard[name], each = told(table(teacher), table(1), tokens)
    mask = np.asarray(rows[name].said_BxL)[:, 1:]
    apart[name] = np.asarray(each)[mask].mean()
  reward = jnp.array([1.0, 0.0, 0.2, 0.6])
  got, parts = jax.jit(functools.partial(objective.loss, cfg, reader))(
    Side(table(1), None),
    rows['texts'],
    rows['said'] if speaks else None,
    objective.Heard(heard['texts'], heard['said'], reward, heard['kept']),
    rows['kept'],
  )
  if not speaks:
    want = 0.7 * apart['texts'] + 3 * apart['kept']
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert set(parts) == {'divergence', 'kept'}
    return
  logs = np.asarray(jax.nn.log_softmax(table(1)))
  gain = 0.0
  for row, length, paid in zip(
    np.asarray(rows['said'].tokens_BxL), (6, 3, 5, 4), (1.0, -1.0, -0.4, 0.4)
  ):
    gain += (
      paid * logs[row[: length - 1], row[1:length]].sum() / (5 + 2 + 4 + 3)
    )
  want = 0.7 * (0.6 * apart['texts'] + 0.4 * apart['said'])
  want += 3 * apart['kept'] - 0.3 * gain
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_equal_rewards_teach_nothing():
  pay = jnp.full((8,), 0.7)
  np.testing.assert_allclose(objective.advantage(pay, 4), 0.0, atol=1e-6)


def test_a_row_is_not_compared_with_another_group():
  pay = jnp.array([1.0, 0.0, 5.0, 5.0])
  np.testing.assert_allclose(objective.advantage(pay, 2), [1.0, -1.0, 0.0, 0.0])


def test_texts_that_are_read_together_are_those_read_one_by_one():
  reader, context = cases.knowing_reader(), jnp.arange(12.0).reshape(3, W)
  texts = {
    name: readers.Said(cases.tokens(B, 8, seed=B) % W, None, None)
    for name, B in (('texts', 6), ('kept', 9), ('said', 24))
  }
  got = objective._read(reader, Side(table(0), context), none=None, **texts)
  assert list(got) == list(texts)
  for name, rows in texts.items():
    want = readers.score(reader, table(0), context, rows.tokens_BxL)
    np.testing.assert_array_equal(got[name], want)


@pytest.mark.parametrize(
  'values, words',
  [
    ({'divergence': 'l2'}, "divergence='l2': one of forward_kl"),
    ({'alpha': 1.5}, 'alpha=1.5: from 0 to 1'),
    ({'group': 1}, 'leave-one-out'),
    ({'steps': 0}, 'steps=0: at least 1'),
    ({'rate': 0.0}, 'rate=0.0: above 0'),
  ],
  ids=lambda x: str(x)[:12],
)
def test_impossible_settings_are_refused_in_words(values, words):
  with pytest.raises(ValueError, match=words):
    SeedConfig(**values)


def test_reward_and_divergence_are_means_over_tokens_alike():
  # the same rows twice as long, no more to choose in them: the same gradient
  reader, ones = cases.table_reader(), jnp.ones(8, int)
  cfg = SeedConfig(alpha=0.0, group=4)
  heard = objective.Heard(None, None, jnp.arange(8.0) % 4)
  grads = []
  for n in (1, 2):
    tokens = jnp.tile(cases.tokens(8, 6) % W, (1, n))
    said = readers.Said(tokens, ones, 6 * n * ones)

    def value(params, said=said):
      return objective.loss(cfg, reader, Side(params, None), None, said, heard)[
        0
      ]

    grads.append(jax.jit(jax.grad(value))(table(1)))
  size = [float(jnp.linalg.norm(g)) for g in grads]
  assert 0.7 < size[1] / size[0] < 1.4
