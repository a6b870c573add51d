"""Documents laid end to end and cut into rows of exactly L tokens.

A lane is an endless strip of documents; a row is the lane's next L tokens. A
lane that has finished its document takes the next one that no lane has taken,
so the documents are read once each and in order, however many lanes there are.
"""

import grain
import numpy as np
from absl import flags


class Packed(grain.IterDataset):
  """Rows of `length` tokens from a MapDataset of `Tokenizer.document` arrays.

  Each element is a dict of arrays [lanes, length]: tokens, targets, weights,
  bytes, reset. A target is the token after; the one after a document's last
  belongs to another document and has weight 0, hence no row looks beyond its
  own documents. Row b of an element continues row b of the one before.

  The iterator's state is which documents are open, where, and which comes
  next: it does not depend on `workers`, the number of processes that read and
  tokenise documents ahead (each holds `buffer` of them ready), and neither
  does what comes out. Documents at an end, the rows begun are dropped.

  Where there are fewer documents in an epoch than lanes, the lanes that share
  one begin at different places in it (only when starting afresh).
  """

  def __init__(
    self, documents, *, length, lanes, bos, mark, epoch, corpus, workers=0
  ):
    """mark: whether `reset` shows document starts or is False everywhere.
    epoch: documents in an epoch. corpus: name of what is read, kept in the
    state so that another corpus is refused.
    """
    super().__init__(documents)
    self.documents, self.workers = documents, workers
    self.length, self.lanes, self.epoch = length, lanes, epoch
    self.bos, self.mark, self.corpus = bos, mark, corpus

  def __iter__(self):
    return _PackedIterator(self)

  def read_from(self, start):
    """Iterates over the documents from number `start` on, in order."""
    rest = self.documents.slice(slice(start, None))
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    documents = rest.to_iter_dataset(options)
    if self.workers:
      # grain asks absl's flags there; a notebook or a test has parsed none.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      # Ahead of the packing, and dealt out and gathered in turn: the order
      # stays that of the documents.
      documents = documents.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=self.workers, per_worker_buffer_size=16
        )
      )
    return iter(documents)


class _PackedIterator(grain.DatasetIterator):
  def __init__(self, dataset):
    super().__init__()
    self._dataset = dataset
    self._next = 0
    self._numbers = []
    self._offsets = []
    self._documents = []
    self._feed = None

  def __next__(self):
    if not self._numbers:
      self._open_lanes()
    dataset = self._dataset
    rows = empty_rows(dataset.lanes, dataset.length, dataset.bos)
    for lane in range(dataset.lanes):
      filled = 0
      while filled < dataset.length:
        if self._offsets[lane] == self._documents[lane].shape[1] - 1:
          self._take(lane)
        filled += self._place(rows, lane, filled)
    return rows

  def _place(self, rows, lane, at):
    """Copies what fits of the lane's document; returns how many tokens."""
    document, start = self._documents[lane], self._offsets[lane]
    last = document.shape[1] - 1
    end = min(last, start + self._dataset.length - at)
    here = slice(at, at + end - start)
    rows['tokens'][lane, here] = document[0, start:end]
    rows['targets'][lane, here] = document[0, start + 1 : end + 1]
    rows['bytes'][lane, here] = document[1, start + 1 : end + 1]
    rows['weights'][lane, here] = 1
    if end == last:
      rows['weights'][lane, here.stop - 1] = 0
    rows['reset'][lane, at] = start == 0 and self._dataset.mark
    self._offsets[lane] = end
    return end - start

  def _open_lanes(self):
    dataset = self._dataset
    lanes = dataset.lanes
    self._numbers, self._offsets = [0] * lanes, [0] * lanes
    self._documents = [None] * lanes
    copies = -(-lanes // dataset.epoch)
    for lane in range(lanes):
      self._take(lane)
      tokens = self._documents[lane].shape[1] - 1
      self._offsets[lane] = tokens * (lane // dataset.epoch) // copies

  def _take(self, lane):
    """Puts the next document into a lane; StopIteration if there is none."""
    if self._feed is None:
      self._feed = self._dataset.read_from(self._next)
    self._documents[lane] = _with_next(next(self._feed), self._dataset.bos)
    self._numbers[lane], self._offsets[lane] = self._next, 0
    self._next += 1

  def get_state(self):
    """JSON-able; equal at the same place whatever the number of workers."""
    return {
      'corpus': self._dataset.corpus,
      'next': self._next,
      'numbers': list(self._numbers),
      'offsets': list(self._offsets),
    }

  def set_state(self, state):
    """Raises ValueError for the state of another corpus or number of rows."""
    dataset = self._dataset
    if state['corpus'] != dataset.corpus:
      raise ValueError(
        'the corpus or its settings are not those that the data position was '
        f'saved with ({dataset.corpus} now; {state["corpus"]} then)'
      )
    if state['numbers'] and len(state['numbers']) != dataset.lanes:
      raise ValueError(
        f'the data position is of {len(state["numbers"])} carried rows a '
        f'process, and train.batch now gives {dataset.lanes}'
      )
    self._close_feed()
    self._next = state['next']
    self._numbers = list(state['numbers'])
    self._offsets = list(state['offsets'])
    self._documents = [
      _with_next(dataset.documents[number], dataset.bos)
      for number in self._numbers
    ]

  def _close_feed(self):
    if self._feed is not None:
      self._feed.close()
    self._feed = None

  def close(self):
    super().close()
    self._close_feed()


def empty_rows(rows, length, pad):
  """Rows of padding: tokens and targets `pad`, nothing scored."""
  shape = (rows, length)
  return {
    'tokens': np.full(shape, pad, np.int32),
    'targets': np.full(shape, pad, np.int32),
    'weights': np.zeros(shape, np.float32),
    'bytes': np.zeros(shape, np.int32),
    'reset': np.zeros(shape, np.bool_),
  }


def _with_next(document, bos):
  """Adds the first token of whatever document comes next, of 0 bytes."""
  return np.concatenate([document, np.array([[bos], [0]], np.int32)], axis=1)
