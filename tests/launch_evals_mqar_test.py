"""MQAR's rows: pairs first, every key once more, gaps by a power law."""

import dataclasses

import numpy as np
import pytest

from nestax.launch.evals import mqar, suite


def test_every_key_is_asked_for_once_with_its_value():
  made = mqar.recall(64, 4, 32, np.random.default_rng(0), 200)
  for tokens, targets, weights in zip(
    made['tokens'], made['targets'], made['weights']
  ):
    keys, values = tokens[0:8:2], tokens[1:8:2]
    assert len(set(keys)) == 4 == len(set(values))
    assert keys.min() >= 1 and keys.max() < 32 <= values.min()
    at = np.flatnonzero(weights)
    assert len(at) == 4 and at.min() >= 8 and (at % 2 == 0).all()
    assert dict(zip(tokens[at], targets[at])) == dict(zip(keys, values))
  # all ids take part, and no key has a place of its own
  assert set(made['tokens'][:, 0]) > set(range(1, 32)) - {0, 5, 9, 13, 20, 30}
  assert abs(np.corrcoef(made['tokens'][:, [0, 2]].T)[0, 1]) < 0.25


def test_gaps_follow_the_power_law():
  made = mqar.recall(64, 1, 32, np.random.default_rng(0), 20_000)
  at = (made['weights'].argmax(1) - 2) // 2
  found = np.bincount(at, minlength=15) / len(at)
  want = np.arange(1, 16) ** -0.99
  np.testing.assert_allclose(found, want / want.sum(), atol=0.01)


def test_rows_to_train_on_are_a_mixture():
  options = mqar.Options(V=256, most=16, beyond=32)
  made = mqar.mixture(options)(np.random.default_rng(0), 140)
  assert made['tokens'].shape == (140, 64)
  many = np.bincount(made['weights'].sum(1).astype(int))
  assert (many[4], many[8], many[16]) == (100, 20, 20)
  names = [*mqar.problem(64, options).tests]
  assert names == ['4', '8', '16', '32']
  test = mqar.problem(64, options).tests['32'](np.random.default_rng(0), 3)
  assert test['tokens'].shape == (3, 128)


def test_widths_are_models_of_their_own():
  options = dataclasses.replace(mqar.EVALUATION.options, widths='32,64')
  cells = [*mqar.cells(options, suite.Asked(('transformer',)))]
  assert [(c.task, c.key['config']['D']) for c in cells] == [
    ('width 32', 32),
    ('width 64', 64),
  ]
  for wrong, words in (
    ({'widths': 'x'}, 'whole numbers with commas'),
    ({'most': 12}, 'a power of two'),
    ({'V': 512}, 'four times as many'),
  ):
    with pytest.raises(ValueError, match=words):
      mqar.Options(**wrong)
