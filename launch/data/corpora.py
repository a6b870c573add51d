"""Corpora: random-access lists of texts, read from their files when asked for.

A corpus has `len`, `[i] -> str`, and three things besides: `keys` (uint64, one
a document, what the train/validation split goes by), `sizes` (int64, UTF-8
bytes a document, None where only reading would tell) and `fingerprint` (str,
changes when files come, go or change their length).
"""

import bisect
import functools
import hashlib
import json
import os

import numpy as np

LOOKED = 4  # records of each file that `check_records` reads
_BOM = b'\xef\xbb\xbf'
_VISIBLE = np.ones(256, bool)
_VISIBLE[list(b' \t\r\n')] = False


class DataError(ValueError):
  """What the corpus holds cannot be used; says where and why."""


class TextFiles:
  """Local UTF-8 text files.

  A file is one document; with `document_bytes`, a longer one is several of
  about that size, cut at a line end (or, in a longer line, at a character).
  Raises DataError with file and byte offset where the text is not UTF-8.
  """

  def __init__(self, root, names, document_bytes=None):
    self.root = root
    sizes = [os.path.getsize(os.path.join(root, name)) for name in names]
    self.names = [name for name, size in zip(names, sizes) if size]
    self.file_sizes = np.array([s for s in sizes if s], np.int64)
    self.document_bytes = document_bytes
    pieces = np.ones(len(self.names), np.int64)
    if document_bytes:
      pieces = -(-self.file_sizes // document_bytes)
    self.ends = np.cumsum(pieces)
    self.keys = _keys(self.names, pieces)
    self.sizes = self._document_sizes(pieces)
    self.fingerprint = _fingerprint(self.names, sizes, document_bytes)

  def _document_sizes(self, pieces):
    if not self.document_bytes:
      return self.file_sizes
    sizes = np.full(pieces.sum(), self.document_bytes, np.int64)
    sizes[self.ends - 1] = self.file_sizes - (pieces - 1) * self.document_bytes
    return sizes

  def __len__(self):
    return len(self.keys)

  def __getitem__(self, index):
    file, piece = _locate(self.ends, index)
    path = os.path.join(self.root, self.names[file])
    size = int(self.file_sizes[file])
    with open(path, 'rb') as f:
      if not self.document_bytes:
        return _text(f.read(), path, 0).removeprefix('\ufeff')
      start = self._border(f, piece * self.document_bytes, size)
      end = self._border(f, (piece + 1) * self.document_bytes, size)
      f.seek(start)
      text = _text(f.read(end - start), path, start)
      return text if start else text.removeprefix('\ufeff')

  def _border(self, f, nominal, size):
    """First line start after `nominal`, less than a document away."""
    if nominal == 0 or nominal >= size:
      return min(nominal, size)
    f.seek(nominal)
    window = f.read(min(self.document_bytes - 1, 1 << 16))
    cut = nominal + window.find(b'\n') + 1
    if nominal < cut < size:
      return cut
    head = window[:4]
    starts = (i for i, byte in enumerate(head) if byte & 0xC0 != 0x80)
    return nominal + next(starts, len(head))


class JsonLines:
  """JSON-lines files: the string under `text_key` of each line not blank.

  Opening reads every file once for its line ends (16 bytes of memory a line).
  Raises DataError with file and line where a line is not what it should be.
  """

  def __init__(self, root, names, text_key):
    self.root, self.names, self.text_key = root, names, text_key
    indices = [_index_lines(os.path.join(root, name)) for name in names]
    self.starts = [starts for starts, _ in indices]
    self.lines = [lines for _, lines in indices]
    lengths = [np.diff(starts) for starts in self.starts]
    counts = np.array([len(lines) for lines in self.lines], np.int64)
    self.ends = np.cumsum(counts)
    self.keys = _keys(names, counts)
    self.sizes = np.concatenate(
      [length[lines] for length, lines in zip(lengths, self.lines)]
      or [np.zeros(0, np.int64)]
    )
    sizes = [int(starts[-1]) for starts in self.starts]
    self.fingerprint = _fingerprint(names, sizes, text_key)

  def __len__(self):
    return len(self.keys)

  def __getitem__(self, index):
    file, record = _locate(self.ends, index)
    line = int(self.lines[file][record])
    start, end = (int(x) for x in self.starts[file][line : line + 2])
    path = os.path.join(self.root, self.names[file])
    with open(path, 'rb') as f:
      f.seek(start)
      raw = f.read(end - start)
    hint = "; for files of plain text say data.source='text'"
    return _json_text(raw, self.text_key, f'{path}:{line + 1}', hint)


class ArrayRecords:
  """ArrayRecord files; a record is a JSON object with a string under
  `text_key`, or with `text_key=''` the UTF-8 text itself.

  Raises DataError with file and record number where a record is neither.
  """

  def __init__(self, root, names, text_key):
    self.root, self.names, self.text_key = root, names, text_key
    counts = np.array([len(self._reader(i)) for i in range(len(names))])
    self.ends = np.cumsum(counts)
    self.keys = _keys(names, counts.astype(np.int64))
    self.sizes = None
    self.fingerprint = _fingerprint(names, counts.tolist(), text_key)

  @functools.cached_property
  def _readers(self):
    return {}

  def __getstate__(self):
    # Readers hold open files: a worker process opens its own.
    return {k: v for k, v in self.__dict__.items() if k != '_readers'}

  def _reader(self, file):
    if file not in self._readers:
      path = os.path.join(self.root, self.names[file])
      self._readers[file] = _array_record_reader(path)
    return self._readers[file]

  def __len__(self):
    return len(self.keys)

  def __getitem__(self, index):
    file, record = _locate(self.ends, index)
    raw = self._reader(file)[record]
    where = f'{os.path.join(self.root, self.names[file])} record {record}'
    if not self.text_key:
      return _text(raw, where, 0)
    hint = "; for files of plain text say data.text_key=''"
    return _json_text(raw, self.text_key, where, hint)


def check_records(corpus):
  """Reads the first few records of each file, of a corpus that has records.

  A wrong `text_key` then shows before anything is made of the text. Raises
  DataError as reading a document does.
  """
  if isinstance(corpus, TextFiles):
    return
  begin = 0
  for end in corpus.ends:
    for index in range(begin, min(end, begin + LOOKED)):
      corpus[index]
    begin = end


def _keys(names, counts):
  """uint64, one a document: from its file's name and its place in the file.

  SplitMix64's finaliser, on arrays: a corpus may have millions of records.
  """
  seeds = [
    int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
    for name in names
  ]
  first = np.repeat(np.cumsum(counts) - counts, counts)
  place = (np.arange(counts.sum()) - first).astype(np.uint64)
  x = np.repeat(np.array(seeds, np.uint64), counts)
  x = x + (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _fingerprint(*parts):
  return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _locate(ends, index):
  """(file, place in the file) of a document."""
  if not 0 <= index < ends[-1]:
    raise IndexError(f'document {index} of {ends[-1]}')
  file = bisect.bisect_right(ends, index)
  return file, int(index - (ends[file - 1] if file else 0))


def _text(raw, where, offset):
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError as e:
    raise DataError(
      f'{where} is not UTF-8: byte 0x{raw[e.start]:02x} at offset '
      f'{offset + e.start} ({e.reason})'
    ) from None


def _json_text(raw, key, where, hint=''):
  try:
    record = json.loads(_text(raw, where, 0))
  except json.JSONDecodeError as e:
    raise DataError(
      f'{where} is not JSON ({e.msg} at character {e.pos}){hint}'
    ) from None
  except RecursionError:
    raise DataError(f'{where} is JSON nested too deeply') from None
  if not isinstance(record, dict) or not isinstance(record.get(key), str):
    found = f'it is a {type(record).__name__}, no object'
    if isinstance(record, dict):
      found = f'it has {sorted(record)}'
      if key in record:
        found = f'that is of type {type(record[key]).__name__}'
    raise DataError(
      f'{where} has no string under data.text_key={key!r}; {found}'
    )
  try:
    record[key].encode('utf-8')
  except UnicodeEncodeError as e:
    raise DataError(f'{where} is not valid Unicode: {e.reason}') from None
  return record[key]


def _index_lines(path):
  """Lines of a file: where each starts and the file ends; those not blank.

  Both int64; the first line starts after a byte order mark.
  """
  starts, visible, base = [np.zeros(1, np.int64)], [], 0
  with open(path, 'rb') as f:
    if f.read(len(_BOM)) == _BOM:
      base = len(_BOM)
      starts[0] += base
    f.seek(base)
    begun = False  # whether the line that the block cut has shown something
    while block := f.read(1 << 24):
      block = np.frombuffer(block, np.uint8)
      ends = np.flatnonzero(block == ord('\n')) + 1
      # The last piece goes on in the next block; an empty one is no piece.
      pieces = np.append(0, ends[: len(ends) - (ends[-1:] == len(block)).sum()])
      seen = np.logical_or.reduceat(_VISIBLE[block], pieces)
      seen[0] |= begun
      visible.append(seen[: len(ends)])
      begun = seen[-1] if len(seen) > len(ends) else False
      starts.append(ends + base)
      base += len(block)
  visible.append([begun])
  if starts[-1].size and starts[-1][-1] == base:
    visible.pop()
  else:
    starts.append(np.array([base], np.int64))
  lines = np.flatnonzero(np.concatenate([np.zeros(0, bool), *visible]))
  return np.concatenate(starts), lines


def _array_record_reader(path):
  try:
    from array_record.python import array_record_data_source
  except ImportError:
    raise ValueError(
      "data.source='array_record' needs the package array-record, which "
      'exists for Linux only'
    ) from None
  try:
    return array_record_data_source.ArrayRecordDataSource([path])
  except (RuntimeError, ValueError) as e:
    raise DataError(f'{path} is not an ArrayRecord file: {e}') from None
