"""MAD's rows are what the benchmark says, and are scored as it scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from nestax.launch.evals import autoencoder, mad, mad_rows


def rows(task, many=40, train=False, **changes):
  size = mad.BASE[task]._replace(**changes)
  drawn = mad_rows.TASKS[task](size, np.random.default_rng(0), many, train)
  assert drawn['tokens'].min() >= 0 and drawn['targets'].min() >= 0
  assert max(drawn['tokens'].max(), drawn['targets'].max()) < size.V
  return size, drawn


@pytest.mark.parametrize(
  'task', ['in-context recall', 'noisy in-context recall']
)
def test_recall_asks_for_what_was_told_before(task):
  size, drawn = rows(task)
  ids = size.V - size.noise
  tokens, wanted = drawn['tokens'], drawn['weights'] > 0
  assert tokens.shape == (40, size.L - 1)
  whole = np.concatenate([tokens, drawn['targets'][:, -1:]], 1)
  np.testing.assert_array_equal(whole[:, 1:], drawn['targets'])
  pairs = whole.reshape(40, -1, 2)
  noisy = pairs[..., 0] >= ids
  assert (noisy == (pairs[..., 1] >= ids)).all()
  share = noisy[:, :-1].mean()
  assert share == 0 if not size.noise else 0.15 < share < 0.25
  for row, asked in zip(pairs, wanted):
    known = {}
    for i, (key, value) in enumerate(row):
      assert asked[2 * i] == (key in known)
      assert not asked[2 * i - 1] if i else True
      if key < ids:
        assert key < ids // 2 <= value
        assert known.setdefault(key, value) == value
    assert asked[-1]
  _, train = rows(task, train=True)
  assert (train['weights'] == 1).all()


def test_fuzzy_recall_reads_as_keys_and_values():
  size, drawn = rows('fuzzy in-context recall')
  keys, pad = 7, 15
  for tokens, targets, weights in zip(
    *(drawn[k] for k in ('tokens', 'targets', 'weights'))
  ):
    whole = [*tokens, targets[-1]]
    asked = [False, *(weights > 0)]
    first = next(i for i, x in enumerate(whole) if x != pad)
    assert pad not in whole[first:] and len(whole) == size.L + 1
    runs, known = [], {}
    for token, told in zip(whole[first:], asked[first:]):
      if not runs or (runs[-1][0][-1] < keys) != (token < keys):
        runs.append(([], []))
      runs[-1][0].append(token)
      runs[-1][1].append(told)
    assert len(runs) % 2 == 0
    for (key, no), (value, told) in zip(runs[::2], runs[1::2]):
      assert len(key) == 3 == len(set(key)) and not any(no)
      assert len(value) <= 3 and len(set(value)) == len(value)
      assert set(told) == {tuple(key) in known or value is runs[-1][0]}
      assert known.setdefault(tuple(key), value) == value
    assert all(runs[-1][1])
  lengths = {
    len(run)
    for run in _runs_of_keys(rows('fuzzy in-context recall', train=True)[1])
  }
  assert lengths == {1, 2, 3}
  assert set(drawn['tokens'].flat) == set(range(16))


def _runs_of_keys(drawn):
  for row in drawn['tokens']:
    run = []
    for token in row:
      if token < 7:
        run.append(token)
      elif run:
        yield run
        run = []


def test_copies_are_in_order_and_blanks_are_before_ids():
  size, drawn = rows('selective copying')
  for tokens, targets, weights in zip(
    drawn['tokens'], drawn['targets'], drawn['weights']
  ):
    sign = int(np.flatnonzero(tokens == 15)[0])
    assert sign == size.L - 17 and (tokens[sign + 1 :] == 14).all()
    ids = tokens[:sign][tokens[:sign] < 14]
    np.testing.assert_array_equal(targets[-16:], ids)
    assert tokens[sign - 1] < 14  # nothing is inserted behind the last id
    assert weights.sum() == 16 and weights[-16:].all()
  gaps = [
    np.diff(np.flatnonzero(row[:239] < 14)).mean() for row in drawn['tokens']
  ]
  assert 13 < np.mean(gaps) < 16  # 223 blanks before 16 ids


def test_memorization_has_one_map():
  _, one = rows('memorization')
  other = mad_rows.memorization(
    mad.BASE['memorization'], np.random.default_rng(1), 9, True
  )
  known = {}
  for drawn in (one, other):
    assert (drawn['tokens'][:, 1::2] == 255).all()
    assert (drawn['weights'][:, 1::2] == 1).all() and not drawn['weights'][
      :, ::2
    ].any()
    for key, value in zip(
      drawn['tokens'][:, ::2].flat, drawn['targets'][:, 1::2].flat
    ):
      assert key < 127 <= value < 255
      assert known.setdefault(key, value) == value
  assert len(set(known.values())) == len(known) > 100


def test_compression_asks_for_the_whole_row():
  size, drawn = rows('compression')
  np.testing.assert_array_equal(drawn['tokens'], drawn['targets'])
  assert (drawn['tokens'][:, -1] == 15).all() and drawn['tokens'][
    :, :-1
  ].max() < 15
  assert drawn['tokens'].shape == (40, size.L) and (drawn['weights'] == 1).all()
  np.testing.assert_allclose(
    autoencoder.positions(3, 4)[1],
    [np.sin(1), np.sin(1e-4), np.cos(1), np.cos(1e-4)],
    rtol=1e-6,
  )


def test_accuracy_is_the_mean_over_ids():
  # wanted 0, 0, 0, 1; said 0, 0, 2, 1: id 0 has 2/3, 1 has 1, 2 has 0, 3 none
  said = jnp.eye(4)[jnp.array([[0, 0, 2, 1, 3], [3, 3, 3, 3, 3]])]
  batch = {
    'targets': jnp.array([[0, 0, 0, 1, 0], [0] * 5]),
    'weights': jnp.array([[1.0, 1, 1, 1, 0], [0] * 5]),
  }
  points, weight = mad_rows.by_id(said, batch)
  assert float(weight) == 1  # a row of no weight is none
  np.testing.assert_allclose(points, (2 / 3 + 1 + 0) / 3, rtol=1e-6)
