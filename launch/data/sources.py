"""Where documents come from, and which of them are kept for validation."""

import glob
import os
import sysconfig

import numpy as np

from nestax.launch.data import corpora

SOURCES = ('stdlib', 'text', 'jsonl', 'array_record')
# A text file longer than this is cut at line ends into several documents, so
# that one big file neither sits in memory nor is impossible to split.
DOCUMENT_BYTES = 1 << 18
_SKIPPED_FOLDERS = frozenset(
  ('__pycache__', 'site-packages', 'dist-packages', 'test', 'tests')
  + ('idle_test',)
)


def open_corpus(data):
  """Opens the corpus that `config.data` names.

  Raises ValueError for an unknown source or an empty corpus,
  FileNotFoundError where nothing matches `data.path`.
  """
  if data.source not in SOURCES:
    raise ValueError(
      f'data.source is {data.source!r}; it is one of {", ".join(SOURCES)}'
    )
  if data.source == 'stdlib':
    corpus = _stdlib(data.path)
  else:
    corpus = _local(data)
  if not len(corpus):
    raise ValueError(
      f'the corpus is empty: data.source={data.source!r}, '
      f'data.path={data.path!r} has files but no text in them'
    )
  return corpus


def split(corpus, valid_fraction):
  """Indices (train, validation) of a corpus, int64, the latter in key order.

  A document is for validation where its key falls into the lowest
  `valid_fraction` of all 64-bit numbers, whatever other documents there are;
  in a corpus too small for any to do so, the one with the lowest key is.
  Raises ValueError where one of the two would be empty.
  """
  if len(corpus) < 2:
    raise ValueError(
      f'the corpus has {len(corpus)} document, and a train and a validation '
      'set need at least 2: add files, or for text files lower '
      'data.document_bytes, above which a file is cut into several documents'
    )
  order = np.argsort(corpus.keys, kind='stable')
  limit = np.uint64(min(int(valid_fraction * 2.0**64), 2**64 - 1))
  count = max(1, int((corpus.keys < limit).sum()))
  if count == len(corpus):
    raise ValueError(
      f'all {count} documents fall into the validation set at '
      f'data.valid_fraction={valid_fraction}: lower it or add files'
    )
  return np.sort(order[count:]), order[:count]


def _stdlib(path):
  if path:
    raise ValueError(
      f"data.source='stdlib' takes no path, and data.path is {path!r}: "
      "for files of your own say data.source='text'"
    )
  root = sysconfig.get_paths()['stdlib']
  names = []
  for folder, folders, files in os.walk(root):
    folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
    where = os.path.relpath(folder, root)
    names += [
      os.path.normpath(os.path.join(where, name)).replace(os.sep, '/')
      for name in sorted(files)
      if name.endswith('.py')
    ]
  names = [name for name in names if _is_utf8(os.path.join(root, name))]
  if not names:
    raise FileNotFoundError(
      f"data.source='stdlib': this interpreter has no .py files under {root} "
      "(it may keep its library in a zip); say data.source='text' and a path"
    )
  return corpora.TextFiles(root, names)


def _local(data):
  if not data.path:
    raise ValueError(
      f'data.source={data.source!r} needs data.path, a glob such as '
      "'corpus/**/*.txt'"
    )
  pattern = os.path.expanduser(data.path)
  if os.path.isdir(pattern):
    raise ValueError(
      f'data.path={data.path!r} is a folder; give a glob such as '
      f"'{os.path.join(data.path, '**', '*.txt')}'"
    )
  paths = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
  if not paths:
    raise FileNotFoundError(
      f'no file matches data.path={data.path!r} (from {os.getcwd()})'
    )
  root = _fixed_root(pattern)
  names = [os.path.relpath(p, root).replace(os.sep, '/') for p in paths]
  if data.source == 'text':
    size = data.get('document_bytes', DOCUMENT_BYTES)
    if size < 16:
      raise ValueError(f'data.document_bytes is {size}; at least 16 is needed')
    return corpora.TextFiles(root, names, size)
  if data.source == 'array_record':
    return corpora.ArrayRecords(root, names, data.text_key)
  if not data.text_key:
    raise ValueError("data.source='jsonl' needs data.text_key, not ''")
  return corpora.JsonLines(root, names, data.text_key)


def _fixed_root(pattern):
  """The folder above the first wildcard: moving it keeps the split."""
  parts = pattern.split(os.sep)
  wild = (i for i, part in enumerate(parts) if glob.has_magic(part))
  first = next(wild, len(parts) - 1)
  return os.sep.join(parts[: min(first, len(parts) - 1)]) or (
    os.sep if pattern.startswith(os.sep) else '.'
  )


def _is_utf8(path):
  try:
    with open(path, 'rb') as f:
      f.read().decode('utf-8')
  except (OSError, UnicodeDecodeError):
    return False
  return True
