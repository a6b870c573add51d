"""Batches: the same again, none lost, none shared, and resumed exactly."""

import itertools
import json

import data_cases as cases
import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nestax.launch.data import pipeline, tokenizers


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return cases.write_corpus(tmp_path_factory.mktemp('corpus'))


def differs(left, right):
  return any((a['tokens'] != b['tokens']).any() for a, b in zip(left, right))


VARIANTS = {
  'rows': {},
  'carried': {'carry_state': True},
  'in order': {'shuffle': False},
  'prefetched': {'prefetch': 3},
  'carried ahead': {'carry_state': True, 'prefetch': 2},
}


@pytest.fixture(params=list(VARIANTS))
def config(request, corpus):
  return cases.settings(corpus, **VARIANTS[request.param])


def test_batches_are_as_the_model_wants_them(config):
  batch = next(pipeline.train_iterator(config))
  kinds = {key: (array.dtype.name, array.shape) for key, array in batch.items()}
  dtypes = {'tokens': 'int32', 'targets': 'int32', 'weights': 'float32'}
  dtypes |= {'bytes': 'int32', 'reset': 'bool'}
  assert kinds == {key: (dtype, (4, 16)) for key, dtype in dtypes.items()}
  assert all(isinstance(array, np.ndarray) for array in batch.values())


def test_seed_decides_the_batches(config):
  first = cases.take(pipeline.train_iterator(config), 20)
  cases.assert_same(cases.take(pipeline.train_iterator(config), 20), first)
  config.seed += 1
  other = cases.take(pipeline.train_iterator(config), 20)
  assert differs(first, other) == config.data.shuffle


def test_saved_place_is_exact_to_the_batch(config):
  iterator = pipeline.train_iterator(config)
  cases.take(iterator, 5)
  state = json.loads(json.dumps(iterator.get_state()))
  want = cases.take(iterator, 3)
  iterator.set_state(state)
  cases.assert_same(cases.take(iterator, 3), want)
  fresh = pipeline.train_iterator(config)
  fresh.set_state(state)
  cases.assert_same(cases.take(fresh, 3), want)


def test_saved_place_goes_through_orbax(config, tmp_path):
  iterator = pipeline.train_iterator(config)
  cases.take(iterator, 5)
  with ocp.CheckpointManager(tmp_path) as manager:
    save = grain.checkpoint.CheckpointSave(iterator)
    manager.save(5, args=ocp.args.Composite(data=save))
    want = cases.take(iterator, 3)
    manager.wait_until_finished()
    fresh = pipeline.train_iterator(config)
    restore = grain.checkpoint.CheckpointRestore(fresh)
    manager.restore(5, args=ocp.args.Composite(data=restore))
  cases.assert_same(cases.take(fresh, 3), want)


def test_saved_place_of_another_corpus_is_refused(config, corpus):
  iterator = pipeline.train_iterator(config)
  cases.take(iterator, 2)
  state = iterator.get_state()
  config.data.path = str(corpus).replace('*', '[0-4]*')
  with pytest.raises(ValueError, match='the corpus or its settings are not'):
    pipeline.train_iterator(config).set_state(state)


@pytest.mark.parametrize('carry', [False, True], ids=['rows', 'carried'])
def test_workers_change_neither_batches_nor_places(corpus, carry):
  plain = pipeline.train_iterator(cases.settings(corpus, carry_state=carry))
  config = cases.settings(corpus, carry_state=carry, workers=2, prefetch=1)
  working = pipeline.train_iterator(config)
  cases.assert_same(cases.take(working, 7), cases.take(plain, 7))
  assert working.get_state() == plain.get_state()
  state = working.get_state()
  working.close()
  again = pipeline.train_iterator(cases.settings(corpus, carry_state=carry))
  again.set_state(state)
  cases.assert_same(cases.take(again, 3), cases.take(plain, 3))


def test_rows_carry_on_from_batch_to_batch(corpus):
  config = cases.settings(corpus, carry_state=True)
  batches = cases.take(pipeline.train_iterator(config), 40)
  assert batches[0]['reset'][:, 0].all()
  for before, after in itertools.pairwise(batches):
    scored = before['weights'][:, -1] > 0
    np.testing.assert_array_equal(
      before['targets'][scored, -1], after['tokens'][scored, 0]
    )
    np.testing.assert_array_equal(after['reset'][:, 0], ~scored)


def test_boundary_decides_about_resets_only(corpus):
  marked = cases.take(pipeline.train_iterator(cases.settings(corpus)), 5)
  bare = cases.take(
    pipeline.train_iterator(cases.settings(corpus, boundary='carry')), 5
  )
  assert sum(batch.pop('reset').sum() for batch in marked)
  assert not any(batch.pop('reset').any() for batch in bare)
  cases.assert_same(marked, bare)


@pytest.mark.parametrize('count', [1, 2, 4])
def test_shards_share_an_epoch_out(corpus, count):
  """In order, so that an epoch's end can be seen: each document just once."""
  config = cases.settings(
    corpus, shuffle=False, length=8, batch=4, shards=count
  )
  valid = pipeline.valid_batches(
    cases.settings(corpus, valid_batches=cases.ALL)
  )
  held_out = set(cases.numbers(valid))
  seen = []
  for rows in np.split(np.arange(4), count):
    batches = cases.take(pipeline.train_iterator(config, rows), 400)
    assert batches[0]['tokens'].shape == (4 // count, 8)
    times = cases.numbers(batches)
    assert max(times.values()) - min(times.values()) <= 1
    seen.append(set(times))
  assert sorted(itertools.chain(*seen)) == sorted(set(range(60)) - held_out)


def test_shuffled_rows_lose_and_repeat_nothing(corpus, monkeypatch):
  def rows(count):
    iterator = pipeline.train_iterator(cases.settings(corpus, batch=1))
    return [row['tokens'].tobytes() for row in cases.take(iterator, count)]

  sizes = []
  shuffled = rows(1000)
  monkeypatch.setattr(
    grain.experimental,
    'WindowShuffleIterDataset',
    lambda parent, window_size, seed: sizes.append(window_size) or parent,
  )
  plain = rows(1000)
  block = sizes[0]
  assert 100 < block < 1000
  assert shuffled[:block] != plain[:block]
  assert sorted(shuffled[:block]) == sorted(plain[:block])


def test_epochs_differ_in_order(corpus):
  config = cases.settings(corpus, carry_state=True, batch=1, length=8)
  documents = starts(cases.take(pipeline.train_iterator(config), 2000))
  count = len(set(documents))
  first, second = documents[:count], documents[count : 2 * count]
  assert sorted(first) == sorted(second) == sorted(set(documents))
  assert first != second


def starts(batches):
  tokens = np.concatenate([batch['tokens'][0] for batch in batches])
  text = tokenizers.load('bytes').decode(tokens.tolist())
  return [part[:2] for part in text.split('<')[1:-1]]


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_bytes_of_a_document_add_up_to_its_file(corpus, tmp_path, kind):
  config = cases.settings(corpus, shuffle=False, batch=1, length=8)
  held_out = cases.numbers(
    pipeline.valid_batches(cases.settings(corpus, valid_batches=cases.ALL))
  )
  first = min(set(range(60)) - set(held_out))
  if kind == 'bpe':
    config.data.tokenizer = cases.train_bpe(tmp_path / 'bpe.json')
  count = 0
  for batch in pipeline.train_iterator(config):
    ends = np.flatnonzero(batch['weights'][0] == 0)
    count += int(batch['bytes'][0, : ends[0] if ends.size else None].sum())
    if ends.size:
      break
  assert count == (corpus.parent / f'{first:02d}.txt').stat().st_size


@pytest.mark.parametrize(
  'overrides, words',
  [
    ({'source': 'web'}, "'web'; it is one of"),
    ({'tokenizer': 'words'}, "'words'; it is 'bytes'"),
    ({'boundary': 'stop'}, "'stop'; it is 'reset'"),
    ({'valid_fraction': 0.0}, 'valid_fraction=0.0 must lie between'),
    ({'valid_fraction': 1.0}, 'valid_fraction=1.0 must lie between'),
    ({'valid_batches': 0}, 'data.valid_batches is 0; it must be at least 1'),
    ({'length': 0}, 'data.length is 0; it must be at least 1'),
    ({'workers': -1}, 'data.workers is -1'),
    ({'prefetch': -1}, 'data.prefetch is -1'),
    ({'seed': -1}, 'seed is -1'),
    ({'batch': 0}, 'train.batch is 0'),
    ({'shards': 0}, 'data.shards is 0; it must be at least 1'),
    ({'batch': 5, 'shards': 2}, 'batch=5 is not a multiple of data.shards=2'),
    ({'length': 100_000}, 'less than one row of data.length=100000'),
  ],
  ids=lambda x: (
    '-'.join(map(str, sum(x.items(), ()))) if isinstance(x, dict) else ''
  ),
)
def test_bad_settings_are_refused(corpus, overrides, words):
  pipeline.check(cases.settings(corpus), 259)
  with pytest.raises(ValueError, match=words):
    pipeline.check(cases.settings(corpus, **overrides), 259)


def test_tokenizers_larger_than_the_vocabulary_are_refused(corpus):
  with pytest.raises(ValueError, match=r'259 ids.* only 256.* at least 259'):
    pipeline.check(cases.settings(corpus), 256)


@pytest.mark.parametrize('source', ['jsonl', 'array_record'])
def test_records_make_batches_too(tmp_path, source):
  records = [json.dumps({'text': f'record {i} ' * 5}) for i in range(40)]
  if source == 'jsonl':
    (tmp_path / 'a').write_text('\n'.join(records))
  else:
    module = pytest.importorskip('array_record.python.array_record_module')
    writer = module.ArrayRecordWriter(str(tmp_path / 'a'), 'group_size:1')
    for record in records:
      writer.write(record.encode())
    writer.close()
  config = cases.settings(tmp_path / 'a', source=source, shuffle=False)
  pipeline.check(config, 259)
  first = next(pipeline.train_iterator(config))['tokens'].ravel().tolist()
  text = tokenizers.load('bytes').decode(first)
  assert text.startswith('record') and text.count('record') > 3
  assert pipeline.valid_batches(config)


@pytest.mark.parametrize(
  'lines, words',
  [
    (['{"txt": "words"}'], r'b:1 has no .*data\.text_key=.text.; it has .*txt'),
    (['{"text": "words"}', '', 'words'], 'b:3 is not JSON'),
  ],
  ids=['key', 'no JSON'],
)
def test_the_first_records_of_each_file_are_checked(tmp_path, lines, words):
  """And before their number, which a wrong key would hide behind."""
  (tmp_path / 'b').write_text('\n'.join(lines))
  config = cases.settings(tmp_path / '?', source='jsonl')
  for others in (0, 1, 40):
    (tmp_path / 'a').write_text('{"text": "words"}\n' * others)
    with pytest.raises(ValueError, match=words):
      pipeline.check(config, 259)


def test_a_wrong_key_of_array_records_is_said(tmp_path):
  module = pytest.importorskip('array_record.python.array_record_module')
  writer = module.ArrayRecordWriter(str(tmp_path / 'a'), 'group_size:1')
  writer.write(b'{"txt": "words"}')
  writer.close()
  config = cases.settings(tmp_path / 'a', source='array_record')
  with pytest.raises(ValueError, match=r'a record 0 has no .*data\.text_key='):
    pipeline.check(config, 259)


def test_missing_corpora_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='no file matches'):
    pipeline.check(cases.settings(tmp_path / '*.txt'), 259)


def test_shards_without_documents_are_refused(corpus):
  path = str(corpus).replace('*', '0[0-3]')
  config = cases.settings(path, batch=8, length=4, shards=8)
  with pytest.raises(ValueError, match='3 training documents for 8 shards'):
    pipeline.check(config, 259)
  with pytest.raises(ValueError, match='3 training documents for 8 shards'):
    pipeline.train_iterator(config)


def test_files_that_are_not_utf8_are_named(tmp_path):
  for i in range(6):
    (tmp_path / f'{i}.txt').write_bytes(b'text \xff' * 9)
  config = cases.settings(tmp_path / '*.txt', prefetch=2)
  with pytest.raises(ValueError, match=r'\d\.txt is not UTF-8: byte 0xff at'):
    next(pipeline.train_iterator(config))


def test_standard_library_needs_nothing_but_python():
  config = cases.settings('', source='stdlib', length=256, valid_batches=50)
  pipeline.check(config, 259)
  batch = next(pipeline.train_iterator(config))
  assert 'def ' in ''.join(
    tokenizers.load('bytes').decode(row.tolist())
    for batch in cases.take(pipeline.train_iterator(config), 20)
    for row in batch['tokens']
  )
  assert batch['tokens'].max() <= 257
  assert 3 < pipeline.bigram_bits_per_byte(config) < 4
