"""Rows are the documents themselves, end to end, whatever is cut where."""

import json

import grain
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from nestax.launch.data import packing

BOS = 7
LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=12)


def documents(lengths):
  """Documents whose tokens tell where they are from: 1000 d + position."""
  return [
    np.stack([1000 * (d + 1) + np.arange(n), 1 + np.arange(n)]).astype(np.int32)
    for d, n in enumerate(lengths)
  ]


def packed(lengths, length, lanes=1, repeat=True, **options):
  dataset = grain.MapDataset.source(documents(lengths))
  arguments = {'mark': True, 'corpus': 'c', 'bos': BOS} | options
  return packing.Packed(
    dataset.repeat() if repeat else dataset,
    length=length,
    lanes=lanes,
    epoch=len(lengths),
    **arguments,
  )


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def strips(batches):
  """Each key's rows joined over the batches: [lanes, all tokens]."""
  return {
    key: np.concatenate([batch[key] for batch in batches], axis=1)
    for key in batches[0]
  }


def assert_same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


@hypothesis.given(lengths=LENGTHS, length=st.integers(1, 17))
@hypothesis.settings(max_examples=80, deadline=None)
def test_rows_are_the_documents_in_order(lengths, length):
  batches = list(packed(lengths, length, repeat=False))
  assert len(batches) == sum(lengths) // length
  hypothesis.assume(batches)
  strip = {key: array[0] for key, array in strips(batches).items()}
  tokens = np.concatenate([d[0] for d in documents(lengths)])
  kept = len(batches) * length
  np.testing.assert_array_equal(strip['tokens'], tokens[:kept])
  starts = np.cumsum([0, *lengths[:-1]])
  np.testing.assert_array_equal(
    np.flatnonzero(strip['reset']), starts[starts < kept]
  )
  scored = np.concatenate([d[0, 1:] for d in documents(lengths)])
  weights = strip['weights'] > 0
  np.testing.assert_array_equal(
    strip['targets'][weights], scored[: weights.sum()]
  )
  ends = np.cumsum(lengths) - 1
  np.testing.assert_array_equal(np.flatnonzero(~weights), ends[ends < kept])


@hypothesis.given(
  lengths=LENGTHS, length=st.integers(1, 17), lanes=st.integers(1, 5)
)
@hypothesis.settings(max_examples=80, deadline=None)
def test_no_target_is_of_another_document(lengths, length, lanes):
  for batch in take(iter(packed(lengths, length, lanes)), 6):
    scored = batch['weights'] > 0
    tokens, targets = batch['tokens'][scored], batch['targets'][scored]
    np.testing.assert_array_equal(targets, tokens + 1)
    np.testing.assert_array_equal(batch['bytes'][scored], targets % 1000 + 1)
    assert (batch['targets'][~scored] == BOS).all()
    assert not batch['bytes'][~scored].any()
    assert (batch['reset'] == (batch['tokens'] % 1000 == 0)).all()


@hypothesis.given(
  lengths=LENGTHS, length=st.integers(1, 17), lanes=st.integers(1, 5)
)
@hypothesis.settings(max_examples=80, deadline=None)
def test_rows_carry_on_and_share_the_documents_out(lengths, length, lanes):
  hypothesis.assume(lanes <= len(lengths))
  batches = take(iter(packed(lengths, length, lanes)), 8)
  strip = strips(batches)
  np.testing.assert_array_equal(
    strip['targets'][:, :-1][strip['weights'][:, :-1] > 0],
    strip['tokens'][:, 1:][strip['weights'][:, :-1] > 0],
  )
  # Every document begun is one that no other lane has, until all are used up.
  assert strip['reset'][:, 0].all()
  begun = np.sort(strip['tokens'][strip['reset']] // 1000 - 1)
  times = np.bincount(begun, minlength=len(lengths))
  assert times.max() - times.min() <= 1


def test_lanes_that_share_a_document_begin_apart():
  batch = next(iter(packed([100], 5, lanes=4)))
  assert batch['tokens'][:, 0].tolist() == [1000, 1025, 1050, 1075]
  batch = next(iter(packed([100, 40], 5, lanes=3)))
  assert batch['tokens'][:, 0].tolist() == [1000, 2000, 1050]


def test_without_marks_nothing_is_reset():
  marked = next(iter(packed([5, 5], 10)))
  bare = next(iter(packed([5, 5], 10, mark=False)))
  assert marked.pop('reset').sum() == 2
  assert not bare.pop('reset').any()
  assert_same([marked], [bare])


@hypothesis.given(
  lengths=LENGTHS,
  length=st.integers(1, 17),
  lanes=st.integers(1, 5),
  before=st.integers(0, 6),
)
@hypothesis.settings(max_examples=80, deadline=None)
def test_saved_place_is_exact(lengths, length, lanes, before):
  iterator = iter(packed(lengths, length, lanes))
  take(iterator, before)
  state = json.dumps(iterator.get_state())
  want = take(iterator, 4)
  iterator.set_state(json.loads(state))
  assert_same(take(iterator, 4), want)
  fresh = iter(packed(lengths, length, lanes))
  fresh.set_state(json.loads(state))
  assert json.dumps(fresh.get_state()) == state
  assert_same(take(fresh, 4), want)


def test_saved_place_is_no_view_of_the_iterator():
  iterator = iter(packed([9, 9], 4, lanes=2))
  next(iterator)
  state = iterator.get_state()
  before = json.dumps(state)
  take(iterator, 5)
  assert json.dumps(state) == before


def test_saved_place_of_something_else_is_refused():
  iterator = iter(packed([9, 9], 4, lanes=2))
  next(iterator)
  state = iterator.get_state()
  with pytest.raises(ValueError, match='saved with .d now; c then'):
    iter(packed([9, 9], 4, lanes=2, corpus='d')).set_state(state)
  with pytest.raises(ValueError, match='is of 2 carried rows'):
    iter(packed([9, 9], 4, lanes=3)).set_state(state)


def test_dtypes_and_shapes_are_those_of_padding():
  batch = next(iter(packed([9, 9], 4, lanes=2)))
  padding = packing.empty_rows(2, 4, 0)
  assert batch.keys() == padding.keys()
  for key in batch:
    assert (batch[key].shape, batch[key].dtype) == ((2, 4), padding[key].dtype)
