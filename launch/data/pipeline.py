"""The grain pipeline: a corpus in, batches of token rows out.

A batch is a dict of numpy arrays [rows, L]: `tokens` int32, `targets` int32
(the next token), `weights` float32 (0: not scored), `bytes` int32 (UTF-8 bytes
that the target stands for, 0 for specials), `reset` bool (a document starts
here). A document is bos + text + eos.
"""

import itertools

import grain
import numpy as np

from nestax.launch.data import corpora, packing, shards, sources, tokenizers

BOUNDARIES = ('reset', 'carry')
# Rows are shuffled in blocks of about this many tokens (some 20 MB).
_SHUFFLE_TOKENS = 1 << 20
# Validation rows are chosen from this many times as many candidates.
_SPREAD = 8


class _Documents:
  """Some of a corpus's documents, tokenised: what grain reads from."""

  def __init__(self, corpus, indices, tokenizer):
    self.corpus, self.indices, self.tokenizer = corpus, indices, tokenizer

  def __len__(self):
    return len(self.indices)

  def __getitem__(self, i):
    return self.tokenizer.document(self.corpus[int(self.indices[i])])


def check(config, vocabulary):
  """Raises ValueError or FileNotFoundError, in words, for a bad data config.

  vocabulary: ids that the model has; the tokenizer may have no more.
  """
  data = config.data
  _check_values(config)
  tokenizer = tokenizers.load(data.tokenizer)
  if tokenizer.vocab_size > vocabulary:
    raise ValueError(
      f'the tokenizer {data.tokenizer!r} has {tokenizer.vocab_size} ids and '
      f"the model's vocabulary only {vocabulary}: model.V must be at least "
      f'{tokenizer.vocab_size}'
    )
  corpus = sources.open_corpus(data)
  corpora.check_records(corpus)  # before their number: it may be the reason
  train, _ = sources.split(corpus, data.valid_fraction)
  _check_size(corpus, train, data)


def train_iterator(config, rows=None):
  """Endless training batches: the given rows of `train.batch` rows.

  Returns a grain.DatasetIterator: `get_state` and `set_state` are exact to
  the batch, also with prefetching. What a batch holds depends on the config
  and the corpus only; neither `data.workers` nor `data.prefetch` nor the
  number of processes changes it, nor what a saved state means.

  Each epoch deals every document to one of `data.shards` shards, shuffled
  anew if `data.shuffle`. With `train.carry_state` row b continues row b of the
  batch before. Without it rows are windows of the shard's packed documents,
  shuffled in blocks of about a million tokens.

  rows: numbers of those that this process reads, rising; None for all.

  Raises what `check` raises about the corpus and the shards.
  """
  _check_shards(config)
  data, batch = config.data, config.train.batch
  tokenizer = tokenizers.load(data.tokenizer)
  corpus = sources.open_corpus(data)
  train, _ = sources.split(corpus, data.valid_fraction)
  _check_size(corpus, train, data)
  documents = grain.MapDataset.source(_Documents(corpus, train, tokenizer))
  if data.shuffle:
    documents = documents.shuffle(seed=config.seed)

  def open_shard(number):
    mine = documents[number :: data.shards]
    return _shard(config, corpus, train, tokenizer, mine)

  rows = np.arange(batch) if rows is None else rows
  return shards.Rows(open_shard, rows, batch // data.shards, data.shards)


def _shard(config, corpus, train, tokenizer, documents):
  """Endless batches of one shard's rows."""
  data, carry = config.data, config.train.carry_state
  rows = config.train.batch // data.shards
  dataset = packing.Packed(
    documents.repeat(),
    length=data.length,
    lanes=rows if carry else 1,
    bos=tokenizer.bos,
    mark=data.boundary == 'reset',
    epoch=len(documents),
    corpus=f'{corpus.fingerprint}: {len(train)} documents, '
    f'{tokenizer.vocab_size} ids, seed {config.seed}',
    workers=data.workers,
  )
  if not carry:
    dataset = dataset.map(_first_row)
    if data.shuffle:
      window = _shuffle_window(corpus, train, data)
      dataset = grain.experimental.WindowShuffleIterDataset(
        dataset, window_size=max(window, rows), seed=config.seed
      )
    dataset = dataset.batch(rows)
  if data.prefetch:
    dataset = grain.experimental.ThreadPrefetchIterDataset(
      dataset, prefetch_buffer_size=data.prefetch
    )
  return iter(dataset)


def valid_batches(config, rows=None):
  """The validation batches: a list, the same every time.

  Rows are windows of the packed validation documents, evenly spread over
  them; of a large corpus, over as many documents (in the order of their keys,
  which is as good as random) as hold 8 times the tokens wanted. There are
  `data.valid_batches` batches, or fewer where the text ends; rows that the
  last one lacks are padding with weight 0.

  rows: numbers of the rows that this process reads, None for all.

  Raises corpora.DataError where the validation text does not fill one row.
  """
  batch, wanted = config.train.batch, config.data.valid_batches
  found, pad = _valid_rows(config, wanted * batch)
  mine = slice(None) if rows is None else rows
  batches = []
  for start in range(0, len(found), batch):
    chosen = found[start : start + batch]
    padding = packing.empty_rows(batch - len(chosen), config.data.length, pad)
    batches.append(
      {
        key: np.concatenate([*(row[key] for row in chosen), padding[key]])[mine]
        for key in padding
      }
    )
  return batches


def bigram_bits_per_byte(config):
  """Entropy of a byte given the one before it, bits, on the validation bytes.

  Of exactly the bytes that `valid_batches` scores (over all processes), under
  their own counts: what a model that knows nothing but the bigrams of this
  very text would reach. The byte before a document's first is a symbol of its
  own; ends of documents are not counted.
  """
  tokenizer = tokenizers.load(config.data.tokenizer)
  counts_257x256 = np.zeros((257, 256), np.int64)
  for batch in valid_batches(config):
    before, byte = _byte_pairs(batch, tokenizer)
    np.add.at(counts_257x256, (before, byte), 1)
  counts_257 = counts_257x256.sum(1)
  joint = _plogp(counts_257x256) - _plogp(counts_257)
  return float(-joint / counts_257.sum())


def _plogp(counts):
  counts = counts[counts > 0]
  return float((counts * np.log2(counts)).sum())


def _byte_pairs(batch, tokenizer):
  """(byte before or 256, byte) for each byte of the scored targets."""
  table = np.frombuffer(b''.join(tokenizer.pieces), np.uint8).astype(np.int64)
  ends = np.cumsum(tokenizer.byte_lengths)
  scored = (batch['weights'] > 0) & (batch['bytes'] > 0)
  context, target = batch['tokens'][scored], batch['targets'][scored]
  # A target may stand for less than its whole piece: for its last bytes.
  lengths = batch['bytes'][scored]
  firsts = np.cumsum(lengths) - lengths
  places = np.repeat(ends[target] - lengths - firsts, lengths)
  byte = table[places + np.arange(lengths.sum())]
  before = np.roll(byte, 1)
  known = tokenizer.byte_lengths[context] > 0
  before[firsts] = np.where(known, table[ends[context] - 1], 256)
  return before, byte


def _valid_rows(config, wanted):
  """At most `wanted` rows, spread over the validation set; the padding id."""
  data = config.data
  tokenizer = tokenizers.load(data.tokenizer)
  corpus = sources.open_corpus(data)
  _, valid = sources.split(corpus, data.valid_fraction)
  packed = packing.Packed(
    grain.MapDataset.source(_Documents(corpus, valid, tokenizer)),
    length=data.length,
    lanes=1,
    bos=tokenizer.bos,
    mark=data.boundary == 'reset',
    epoch=len(valid),
    corpus=corpus.fingerprint,
  )
  rows = list(itertools.islice(packed, _SPREAD * wanted))
  if not rows:
    raise corpora.DataError(
      f'the {len(valid)} validation documents are shorter than one row of '
      f'data.length={data.length} tokens: add text, raise '
      f'data.valid_fraction={data.valid_fraction} or lower data.length'
    )
  count = min(wanted, len(rows))
  return [rows[i * len(rows) // count] for i in range(count)], tokenizer.pad


def _first_row(rows):
  return {key: array[0] for key, array in rows.items()}


def _shuffle_window(corpus, train, data):
  """Rows a shuffled block: at most an epoch's, where that is known."""
  window = max(1, _SHUFFLE_TOKENS // data.length)
  if corpus.sizes is None:
    return window
  epoch = int(corpus.sizes[train].sum()) // data.length // data.shards
  return max(1, min(window, epoch))


def _check_values(config):
  data = config.data
  if data.boundary not in BOUNDARIES:
    raise ValueError(
      f"data.boundary is {data.boundary!r}; it is 'reset' (the memory forgets "
      "where a document starts) or 'carry' (it goes on)"
    )
  if not 0 < data.valid_fraction < 1:
    raise ValueError(
      f'data.valid_fraction={data.valid_fraction} must lie between 0 and 1'
    )
  least = {
    'data.length': (data.length, 1),
    'data.valid_batches': (data.valid_batches, 1),
    'data.shards': (data.shards, 1),
    'data.workers': (data.workers, 0),
    'data.prefetch': (data.prefetch, 0),
    'train.batch': (config.train.batch, 1),
    'seed': (config.seed, 0),
  }
  for name, (value, minimum) in least.items():
    if value < minimum:
      raise ValueError(f'{name} is {value}; it must be at least {minimum}')
  _check_shards(config)


def _check_shards(config):
  if config.train.batch % config.data.shards:
    raise ValueError(
      f'train.batch={config.train.batch} is not a multiple of '
      f'data.shards={config.data.shards}'
    )


def _check_size(corpus, train, data):
  if len(train) < data.shards:
    raise ValueError(
      f'{len(train)} training documents for {data.shards} shards: each needs '
      'at least one; add files, or lower data.document_bytes or data.shards'
    )
  if corpus.sizes is None:
    return
  # No tokenizer here makes more than one token of a byte; bos and eos come on.
  tokens = int(corpus.sizes[train].sum()) + 2 * len(train)
  if tokens < data.length:
    raise ValueError(
      f'the {len(train)} training documents hold at most {tokens} tokens, less '
      f'than one row of data.length={data.length}: add text or lower it'
    )
