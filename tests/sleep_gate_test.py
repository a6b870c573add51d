"""The gate rolls back what harms."""

import jax
import numpy as np
import pytest
import sleep_cases as cases

from nestax.sleep import gate
from nestax.sleep import reader as readers
from nestax.sleep.gate import GateConfig

BEFORE = {'core': 2.0, 'day': 4.0}


@pytest.mark.parametrize(
  'after, accepted, words',
  [
    ({'core': 2.0, 'day': 3.0}, True, 'accepted: core loss'),
    ({'core': 2.019, 'day': 3.0}, True, 'accepted'),
    ({'core': 2.03, 'day': 1.0}, False, 'core loss rose by 1.50%'),
    ({'core': 2.0, 'day': 4.1}, False, "the day's content fell by -2.50%"),
    ({'core': float('nan'), 'day': 3.0}, False, 'core is nan'),
    ({'core': 2.0, 'day': float('inf')}, False, 'day is inf'),
  ],
)
def test_decisions(after, accepted, words):
  decision = gate.decide(GateConfig(core=0.01), BEFORE, after)
  assert decision.accepted == accepted
  assert words in decision.reason


def test_losses_are_means_over_tokens_that_count():
  reader = cases.table_reader()
  table = jax.random.normal(jax.random.key(0), (4, 4))
  tokens = np.random.default_rng(0).integers(0, 4, (5, 6))
  length = np.array([6, 3, 1, 2, 6])
  logs = np.asarray(jax.nn.log_softmax(table))
  nats = [
    [-logs[a, b] for a, b in zip(row[: n - 1], row[1:n])]
    for row, n in zip(tokens, length)
  ]
  for at_a_time in (2, 5, 8):
    asked = reader, table, None, tokens, length, at_a_time
    sums, counts = gate.row_nats(*asked)
    np.testing.assert_allclose(sums, [sum(x) for x in nats], rtol=1e-5)
    assert counts.tolist() == [5, 2, 0, 1, 5]
    mean = np.mean(sum(nats, []))
    np.testing.assert_allclose(gate.loss(*asked), mean, rtol=1e-5)


def test_what_may_not_be_said_does_not_count():
  """Such as a character unknown to the tokenizer, in a text to be kept."""
  reader = cases.table_reader()
  tokens, length = np.array([[0, 1, 3, 2, 1]]), np.array([5])

  def read(*asked):
    state, logits = reader.read(*asked)
    return state, logits.at[..., 3].set(readers.NEVER)

  table = jax.random.normal(jax.random.key(0), (4, 4))
  asked = reader._replace(read=read), table, None, tokens, length, 1
  sums, counts = gate.row_nats(*asked)
  logs = np.asarray(jax.nn.log_softmax(table[:, :3]))
  want = -(logs[0, 1] + logs[3, 2] + logs[2, 1])
  np.testing.assert_allclose(sums, [want], rtol=1e-5)
  assert counts.tolist() == [3]
  # a model that has come to nothing is not excused
  asked = reader._replace(read=read), table * np.nan, None, tokens, length, 1
  assert np.isnan(gate.loss(*asked))


def test_a_day_of_which_nothing_counts_decides_nothing():
  losses = {'core': 2.0, 'day': 0.0}
  assert gate.decide(GateConfig(), losses, losses).accepted


@pytest.mark.parametrize('values', [{'core': -0.1}, {'day': 1.0}], ids=str)
def test_impossible_margins_are_refused(values):
  with pytest.raises(ValueError, match=f'{next(iter(values))}='):
    GateConfig(**values)
