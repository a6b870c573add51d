"""Batches: the same again, none lost, none shared, and resumed exactly."""

import collections
import itertools
import json
import math
import random
import re

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from nestax.launch.data import pipeline, tokenizers

TRAIN = {'batch': 4, 'carry_state': False}
DATA = {
  'source': 'text',
  'text_key': 'text',
  'tokenizer': 'bytes',
  'boundary': 'reset',
  'length': 16,
  'valid_fraction': 0.2,
  'valid_batches': 3,
  'shuffle': True,
  'workers': 0,
  'prefetch': 0,
}
ALL = 10_000  # validation batches: more than there are


def settings(path, seed=3, **overrides):
  train = {key: overrides.pop(key, value) for key, value in TRAIN.items()}
  data = DATA | {'path': str(path)} | overrides
  return ConfigDict({'seed': seed, 'data': data, 'train': train})


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """60 documents `<12>words...`, each told by its number."""
  root = tmp_path_factory.mktemp('corpus')
  rng = random.Random(0)
  for i in range(60):
    words = ['alpha', 'beta', 'caf\u00e9', '\n']
    text = ' '.join(rng.choices(words, k=rng.randint(3, 40)))
    (root / f'{i:02d}.txt').write_text(f'<{i:02d}>{text}')
  return root / '*.txt'


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def assert_same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def differs(left, right):
  return any((a['tokens'] != b['tokens']).any() for a, b in zip(left, right))


def numbers(batches):
  """How often each document of the corpus starts in the batches."""
  tokens = np.concatenate([b['tokens'].ravel() for b in batches])
  text = tokenizers.load('bytes').decode(tokens.tolist())
  return collections.Counter(int(i) for i in re.findall(r'<(\d\d)>', text))


VARIANTS = {
  'rows': {},
  'carried': {'carry_state': True},
  'in order': {'shuffle': False},
  'prefetched': {'prefetch': 3},
  'carried ahead': {'carry_state': True, 'prefetch': 2},
}


@pytest.fixture(params=list(VARIANTS))
def config(request, corpus):
  return settings(corpus, **VARIANTS[request.param])


def test_batches_are_as_the_model_wants_them(config):
  batch = next(pipeline.train_iterator(config))
  kinds = {key: (array.dtype.name, array.shape) for key, array in batch.items()}
  dtypes = {'tokens': 'int32', 'targets': 'int32', 'weights': 'float32'}
  dtypes |= {'bytes': 'int32', 'reset': 'bool'}
  assert kinds == {key: (dtype, (4, 16)) for key, dtype in dtypes.items()}
  assert all(isinstance(array, np.ndarray) for array in batch.values())


def test_seed_decides_the_batches(config):
  first = take(pipeline.train_iterator(config), 20)
  assert_same(take(pipeline.train_iterator(config), 20), first)
  config.seed += 1
  other = take(pipeline.train_iterator(config), 20)
  assert differs(first, other) == config.data.shuffle


def test_saved_place_is_exact_to_the_batch(config):
  iterator = pipeline.train_iterator(config)
  take(iterator, 5)
  state = json.loads(json.dumps(iterator.get_state()))
  want = take(iterator, 3)
  iterator.set_state(state)
  assert_same(take(iterator, 3), want)
  fresh = pipeline.train_iterator(config)
  fresh.set_state(state)
  assert_same(take(fresh, 3), want)


def test_saved_place_goes_through_orbax(config, tmp_path):
  iterator = pipeline.train_iterator(config)
  take(iterator, 5)
  with ocp.CheckpointManager(tmp_path) as manager:
    save = grain.checkpoint.CheckpointSave(iterator)
    manager.save(5, args=ocp.args.Composite(data=save))
    want = take(iterator, 3)
    manager.wait_until_finished()
    fresh = pipeline.train_iterator(config)
    restore = grain.checkpoint.CheckpointRestore(fresh)
    manager.restore(5, args=ocp.args.Composite(data=restore))
  assert_same(take(fresh, 3), want)


def test_saved_place_of_another_corpus_is_refused(config, corpus):
  iterator = pipeline.train_iterator(config)
  take(iterator, 2)
  state = iterator.get_state()
  config.data.path = str(corpus).replace('*', '[0-4]*')
  with pytest.raises(ValueError, match='the corpus or its settings are not'):
    pipeline.train_iterator(config).set_state(state)


@pytest.mark.parametrize('carry', [False, True], ids=['rows', 'carried'])
def test_workers_change_neither_batches_nor_places(corpus, carry):
  plain = pipeline.train_iterator(settings(corpus, carry_state=carry))
  config = settings(corpus, carry_state=carry, workers=2, prefetch=1)
  working = pipeline.train_iterator(config)
  assert_same(take(working, 7), take(plain, 7))
  assert working.get_state() == plain.get_state()
  state = working.get_state()
  working.close()
  again = pipeline.train_iterator(settings(corpus, carry_state=carry))
  again.set_state(state)
  assert_same(take(again, 3), take(plain, 3))


def test_rows_carry_on_from_batch_to_batch(corpus):
  config = settings(corpus, carry_state=True)
  batches = take(pipeline.train_iterator(config), 40)
  assert batches[0]['reset'][:, 0].all()
  for before, after in itertools.pairwise(batches):
    scored = before['weights'][:, -1] > 0
    np.testing.assert_array_equal(
      before['targets'][scored, -1], after['tokens'][scored, 0]
    )
    np.testing.assert_array_equal(after['reset'][:, 0], ~scored)


def test_boundary_decides_about_resets_only(corpus):
  marked = take(pipeline.train_iterator(settings(corpus)), 5)
  bare = take(pipeline.train_iterator(settings(corpus, boundary='carry')), 5)
  assert sum(batch.pop('reset').sum() for batch in marked)
  assert not any(batch.pop('reset').any() for batch in bare)
  assert_same(marked, bare)


@pytest.mark.parametrize('count', [1, 2, 4])
def test_processes_share_an_epoch_out(corpus, count):
  """In order, so that an epoch's end can be seen: each document just once."""
  config = settings(corpus, shuffle=False, length=8, batch=4)
  valid = pipeline.valid_batches(settings(corpus, valid_batches=ALL))
  held_out = set(numbers(valid))
  seen = []
  for process in range(count):
    iterator = pipeline.train_iterator(config, process, count)
    assert next(iterator)['tokens'].shape == (4 // count, 8)
    batches = take(pipeline.train_iterator(config, process, count), 400)
    times = numbers(batches)
    assert max(times.values()) - min(times.values()) <= 1
    seen.append(set(times))
  assert sorted(itertools.chain(*seen)) == sorted(set(range(60)) - held_out)


def test_shuffled_rows_lose_and_repeat_nothing(corpus, monkeypatch):
  def rows(count):
    iterator = pipeline.train_iterator(settings(corpus, batch=1))
    return [row['tokens'].tobytes() for row in take(iterator, count)]

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
  config = settings(corpus, carry_state=True, batch=1, length=8)
  documents = starts(take(pipeline.train_iterator(config), 2000))
  count = len(set(documents))
  first, second = documents[:count], documents[count : 2 * count]
  assert sorted(first) == sorted(second) == sorted(set(documents))
  assert first != second


def starts(batches):
  tokens = np.concatenate([batch['tokens'][0] for batch in batches])
  text = tokenizers.load('bytes').decode(tokens.tolist())
  return [part[:2] for part in text.split('<')[1:-1]]


def test_validation_is_held_out_and_always_the_same(config):
  valid = pipeline.valid_batches(config)
  assert_same(pipeline.valid_batches(config), valid)
  assert len(valid) == 3
  config.seed += 1
  assert_same(pipeline.valid_batches(config), valid)
  train = numbers(take(pipeline.train_iterator(config), 300))
  config.data.valid_batches = ALL
  every = numbers(pipeline.valid_batches(config))
  assert len(train) + len(every) >= 55
  assert not set(train) & set(every)


def test_validation_rows_are_spread_over_the_documents(corpus):
  few = pipeline.valid_batches(settings(corpus, valid_batches=1))
  every = pipeline.valid_batches(settings(corpus, valid_batches=ALL))
  rows = np.concatenate([batch['tokens'] for batch in every])
  places = [np.flatnonzero((rows == row).all(1))[0] for row in few[0]['tokens']]
  assert places == sorted(set(places))
  assert places[-1] > 0.5 * min(len(rows), 8 * 4)


def test_validation_ends_in_padding(corpus):
  config = settings(corpus, batch=1, valid_batches=ALL)
  rows = len(pipeline.valid_batches(config))
  config.train.batch = rows - 1
  every = pipeline.valid_batches(config)
  assert [batch['tokens'].shape for batch in every] == [(rows - 1, 16)] * 2
  padding = (every[-1]['tokens'] == 258).all(1)
  assert padding.any() and not padding.all()
  assert not every[-1]['weights'][padding].any()
  assert not any((batch['tokens'] == 258).any() for batch in every[:-1])


def test_processes_share_validation_rows_out(corpus):
  config = settings(corpus, batch=6, valid_batches=ALL)
  parts = [pipeline.valid_batches(config, p, 3) for p in range(3)]
  joined = [
    {key: np.concatenate([part[key] for part in batch]) for key in batch[0]}
    for batch in zip(*parts)
  ]
  assert_same(joined, pipeline.valid_batches(config))


def train_bpe(path):
  import tokenizers as hf

  model = hf.Tokenizer(hf.models.BPE())
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=True)
  model.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=280,
    show_progress=False,
    initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
  )
  model.train_from_iterator(['alpha beta caf\u00e9 <0 <1 ' * 20], trainer)
  model.save(str(path))
  return str(path)


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_bigram_entropy_is_that_of_the_scored_bytes(corpus, tmp_path, kind):
  config = settings(corpus, valid_batches=20)
  if kind == 'bpe':
    config.data.tokenizer = train_bpe(tmp_path / 'bpe.json')
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


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_bytes_of_a_document_add_up_to_its_file(corpus, tmp_path, kind):
  config = settings(corpus, shuffle=False, batch=1, length=8)
  held_out = numbers(
    pipeline.valid_batches(settings(corpus, valid_batches=ALL))
  )
  first = min(set(range(60)) - set(held_out))
  if kind == 'bpe':
    config.data.tokenizer = train_bpe(tmp_path / 'bpe.json')
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
    ({'batch': 5}, 'train.batch=5 is not a multiple of the 2 processes'),
    ({'length': 100_000}, 'less than one row of data.length=100000'),
  ],
  ids=lambda x: '-'.join(map(str, *x.items())) if isinstance(x, dict) else '',
)
def test_bad_settings_are_refused(corpus, overrides, words):
  pipeline.check(settings(corpus), 259, 2)
  with pytest.raises(ValueError, match=words):
    pipeline.check(settings(corpus, **overrides), 259, 2)


def test_tokenizers_larger_than_the_vocabulary_are_refused(corpus):
  with pytest.raises(ValueError, match=r'259 ids.* only 256.* at least 259'):
    pipeline.check(settings(corpus), 256)


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
  config = settings(tmp_path / 'a', source=source, shuffle=False)
  pipeline.check(config, 259)
  first = next(pipeline.train_iterator(config))['tokens'].ravel().tolist()
  text = tokenizers.load('bytes').decode(first)
  assert text.startswith('record') and text.count('record') > 3
  assert pipeline.valid_batches(config)


def test_missing_corpora_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='no file matches'):
    pipeline.check(settings(tmp_path / '*.txt'), 259)


def test_processes_without_documents_are_refused(corpus):
  path = str(corpus).replace('*', '0[0-3]')
  config = settings(path, batch=8, length=4)
  with pytest.raises(ValueError, match='3 training documents for 8 processes'):
    pipeline.check(config, 259, 8)
  with pytest.raises(ValueError, match='3 training documents for 8 processes'):
    pipeline.train_iterator(config, 0, 8)


def test_validation_shorter_than_a_row_is_refused(corpus):
  path = str(corpus).replace('*', '0[0-3]')
  with pytest.raises(ValueError, match='1 validation documents are shorter'):
    pipeline.valid_batches(settings(path, length=400))


def test_files_that_are_not_utf8_are_named(tmp_path):
  for i in range(6):
    (tmp_path / f'{i}.txt').write_bytes(b'text \xff' * 9)
  config = settings(tmp_path / '*.txt', prefetch=2)
  with pytest.raises(ValueError, match=r'\d\.txt is not UTF-8: byte 0xff at'):
    next(pipeline.train_iterator(config))


def test_standard_library_needs_nothing_but_python():
  config = settings('', source='stdlib', length=256, valid_batches=50)
  pipeline.check(config, 259)
  batch = next(pipeline.train_iterator(config))
  assert 'def ' in ''.join(
    tokenizers.load('bytes').decode(row.tolist())
    for batch in take(pipeline.train_iterator(config), 20)
    for row in batch['tokens']
  )
  assert batch['tokens'].max() <= 257
  assert 3 < pipeline.bigram_bits_per_byte(config) < 4
