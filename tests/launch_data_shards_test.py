"""Batches and places in the data are those of the config, not of processes."""

import json

import data_cases as cases
import numpy as np
import pytest

from nestax.launch.data import pipeline, shards

# What the processes of a run read, however many there are and however their
# devices lie: each other's neighbours, the same rows, or every other row.
LAID = {
  'one': [range(4)],
  'two': [range(2), range(2, 4)],
  'four': [[0], [1], [2], [3]],
  'two that hold the same': [range(4), range(4)],
  'two in turn': [[0, 2], [1, 3]],
}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return cases.write_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.mark.parametrize('carry', [False, True], ids=['rows', 'carried'])
@pytest.mark.parametrize('count', [1, 2, 4])
def test_any_processes_read_the_same_batches_on_from_any_others(
  corpus, count, carry
):
  config = cases.settings(corpus, shards=count, carry_state=carry, prefetch=2)
  want = cases.take(pipeline.train_iterator(config), 7)
  saved = {}
  for name, laid in LAID.items():
    places = []
    for rows in laid:
      iterator = pipeline.train_iterator(config, rows)
      got = cases.take(iterator, 4)
      mine = [{k: v[list(rows)] for k, v in batch.items()} for batch in want]
      cases.assert_same(got, mine[:4])
      places.append(json.loads(json.dumps(iterator.get_state())))
      iterator.close()
    saved[name] = shards.join(places)
  for name, place in saved.items():
    for rows in LAID['two'] + LAID['one']:
      iterator = pipeline.train_iterator(config, rows)
      iterator.set_state(place)
      mine = [{k: v[list(rows)] for k, v in batch.items()} for batch in want]
      cases.assert_same(cases.take(iterator, 3), mine[4:]), name
      iterator.close()


def test_shards_read_different_documents(corpus):
  config = cases.settings(corpus, shards=4, length=64)
  batches = cases.take(pipeline.train_iterator(config), 3)
  rows = [
    set(
      cases.numbers(
        [{'tokens': batch['tokens'][i : i + 1]} for batch in batches]
      )
    )
    for i in range(4)
  ]
  assert all(rows) and sum(map(len, rows)) == len(set.union(*rows))


def test_the_place_of_other_shards_is_refused(corpus):
  two = pipeline.train_iterator(cases.settings(corpus, shards=2))
  next(two)
  state = two.get_state()
  one = pipeline.train_iterator(cases.settings(corpus))
  with pytest.raises(ValueError, match='of 2 shards, and data.shards is 1'):
    one.set_state(state)
  del state['shards']['1']
  with pytest.raises(ValueError, match=r'lacks the shards \[1\]'):
    two.set_state(state)


def test_a_place_from_before_there_were_shards_is_taken(corpus):
  config = cases.settings(corpus)
  iterator = pipeline.train_iterator(config)
  cases.take(iterator, 3)
  old = iterator.get_state()['shards']['0']
  want = next(iterator)
  fresh = pipeline.train_iterator(config)
  fresh.set_state(old)
  cases.assert_same([next(fresh)], [want])
  np.testing.assert_array_equal(fresh.get_state(), iterator.get_state())
