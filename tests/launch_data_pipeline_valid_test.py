"""Validation batches and the bigram entropy of exactly their bytes."""

import collections
import math

import data_cases as cases
import numpy as np
import pytest

from nestax.launch.data import pipeline, tokenizers


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return cases.write_corpus(tmp_path_factory.mktemp('corpus'))


def test_validation_is_held_out_and_always_the_same(corpus):
  config = cases.settings(corpus)
  valid = pipeline.valid_batches(config)
  cases.assert_same(pipeline.valid_batches(config), valid)
  assert len(valid) == 3
  config.seed += 1
  cases.assert_same(pipeline.valid_batches(config), valid)
  train = cases.numbers(cases.take(pipeline.train_iterator(config), 300))
  config.data.valid_batches = cases.ALL
  every = cases.numbers(pipeline.valid_batches(config))
  assert len(train) + len(every) >= 55
  assert not set(train) & set(every)


def test_validation_rows_are_spread_over_the_documents(corpus):
  few = pipeline.valid_batches(cases.settings(corpus, valid_batches=1))
  every = pipeline.valid_batches(
    cases.settings(corpus, valid_batches=cases.ALL)
  )
  rows = np.concatenate([batch['tokens'] for batch in every])
  places = [np.flatnonzero((rows == row).all(1))[0] for row in few[0]['tokens']]
  assert places == sorted(set(places))
  assert places[-1] > 0.5 * min(len(rows), 8 * 4)


def test_validation_ends_in_padding(corpus):
  config = cases.settings(corpus, batch=1, valid_batches=cases.ALL)
  rows = len(pipeline.valid_batches(config))
  config.train.batch = rows - 1
  every = pipeline.valid_batches(config)
  assert [batch['tokens'].shape for batch in every] == [(rows - 1, 16)] * 2
  padding = (every[-1]['tokens'] == 258).all(1)
  assert padding.any() and not padding.all()
  assert not every[-1]['weights'][padding].any()
  assert not any((batch['tokens'] == 258).any() for batch in every[:-1])


def test_processes_share_validation_rows_out(corpus):
  config = cases.settings(corpus, batch=6, valid_batches=cases.ALL)
  rows = np.split(np.arange(6), 3)
  parts = [pipeline.valid_batches(config, part) for part in rows]
  joined = [
    {key: np.concatenate([part[key] for part in batch]) for key in batch[0]}
    for batch in zip(*parts)
  ]
  cases.assert_same(joined, pipeline.valid_batches(config))


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_bigram_entropy_is_that_of_the_scored_bytes(corpus, tmp_path, kind):
  config = cases.settings(corpus, valid_batches=20)
  if kind == 'bpe':
    config.data.tokenizer = cases.train_bpe(tmp_path / 'bpe.json')
  tokenizer = tokenizers.load(config.data.tokenizer)
  pairs = collections.Counter()
  fast = collections.Counter()
  scored = 0
  for batch in pipeline.valid_batches(config):
    before, byte = pipeline._byte_pairs(batch, tokenizer)
    fast.update(zip(before.tolist(), byte.tolist()))
    scored += int(batch['bytes'].sum())
    for row in range(4):
      for i in np.flatnonzero(batch['bytes'][row]):
        context = tokenizer.pieces[batch['tokens'][row, i]]
        piece = tokenizer.pieces[batch['targets'][row, i]]
        piece = piece[len(piece) - batch['bytes'][row, i] :]
        pairs.update(zip([*(context[-1:] or [256]), *piece], piece))
  assert fast == pairs
  assert (256, ord('<')) in pairs
  assert sum(pairs.values()) == scored > 500
  before = collections.Counter()
  for (a, _), n in pairs.items():
    before[a] += n
  bits = -sum(n * math.log2(n / before[a]) for (a, _), n in pairs.items())
  got = pipeline.bigram_bits_per_byte(config)
  assert got == pytest.approx(bits / scored, rel=1e-9)
  assert 0.2 < got < 3


def test_validation_shorter_than_a_row_is_refused(corpus):
  path = str(corpus).replace('*', '0[0-3]')
  with pytest.raises(ValueError, match='1 validation documents are shorter'):
    pipeline.valid_batches(cases.settings(path, length=400))
