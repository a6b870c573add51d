"""Sources are found, refused in words, and split the same way every time."""

import json
import random

import numpy as np
import pytest
from ml_collections import ConfigDict

from nestax.launch.data import sources


def data(source='text', path='', **overrides):
  return ConfigDict(
    {'source': source, 'path': str(path), 'text_key': 'text'} | overrides
  )


def write_files(root, count):
  root.mkdir(parents=True, exist_ok=True)
  for i in range(count):
    (root / f'{i:03d}.txt').write_text(f'document {i}\n' * (i + 1))


def test_standard_library_is_source_text_without_tests():
  corpus = sources.open_corpus(data('stdlib'))
  assert {'ast.py', 'json/decoder.py'} <= set(corpus.names)
  assert not [n for n in corpus.names if {'test', 'tests'} & set(n.split('/'))]
  assert not [n for n in corpus.names if 'site-packages' in n]
  assert corpus[corpus.names.index('ast.py')].count('def ') > 50
  train, valid = sources.split(corpus, 0.05)
  assert 0.01 < len(valid) / len(corpus) < 0.12
  assert sorted([*train, *valid]) == list(range(len(corpus)))


def test_standard_library_skips_what_is_not_utf8(tmp_path, monkeypatch):
  (tmp_path / 'pkg' / 'tests').mkdir(parents=True)
  for name in ('a.py', 'pkg/b.py', 'pkg/tests/c.py', 'd.txt'):
    (tmp_path / name).write_text('x = 1\n')
  (tmp_path / 'latin.py').write_bytes(b'# caf\xe9\n')
  paths = {'stdlib': str(tmp_path)}
  monkeypatch.setattr(sources.sysconfig, 'get_paths', lambda: paths)
  assert sources.open_corpus(data('stdlib')).names == ['a.py', 'pkg/b.py']


def test_standard_library_in_a_zip_is_said(tmp_path, monkeypatch):
  paths = {'stdlib': str(tmp_path)}
  monkeypatch.setattr(sources.sysconfig, 'get_paths', lambda: paths)
  with pytest.raises(FileNotFoundError, match='no .py files under'):
    sources.open_corpus(data('stdlib'))


@pytest.mark.parametrize(
  'overrides, error, words',
  [
    ({'source': 'web'}, ValueError, "'web'; it is one of stdlib, text"),
    ({'source': 'stdlib', 'path': 'x'}, ValueError, 'takes no path'),
    ({'path': ''}, ValueError, 'needs data.path'),
    ({'path': 'folder'}, ValueError, 'is a folder; give a glob'),
    ({'path': 'none/*.txt'}, FileNotFoundError, 'no file matches'),
    ({'path': 'empty.txt'}, ValueError, 'corpus is empty'),
    ({'path': 'a.txt', 'document_bytes': 4}, ValueError, 'at least 16'),
    (
      {'source': 'jsonl', 'path': 'a.txt', 'text_key': ''},
      ValueError,
      "not ''",
    ),
    ({'source': 'jsonl', 'path': 'empty.txt'}, ValueError, 'corpus is empty'),
  ],
  ids=lambda x: '-'.join(map(str, x.values())) if isinstance(x, dict) else '',
)
def test_bad_sources_are_refused(
  tmp_path, monkeypatch, overrides, error, words
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'a.txt').write_text('alpha')
  (tmp_path / 'empty.txt').write_text('')
  with pytest.raises(error, match=words):
    sources.open_corpus(data(**overrides))


def test_split_does_not_depend_on_where_the_corpus_lies(tmp_path):
  for folder in ('here', 'there/deep'):
    write_files(tmp_path / folder, 50)
  valid = [
    sources.split(sources.open_corpus(data(path=path)), 0.2)[1].tolist()
    for path in (tmp_path / 'here/*.txt', tmp_path / 'there/deep/*.txt')
  ]
  assert valid[0] == valid[1]
  assert 3 <= len(valid[0]) <= 20


def test_new_files_leave_the_old_ones_on_their_side(tmp_path):
  write_files(tmp_path, 60)
  config = data(path=tmp_path / '*.txt')
  before = valid_names(sources.open_corpus(config))
  write_files(tmp_path, 120)
  after = valid_names(sources.open_corpus(config))
  assert before < after
  assert all(int(name[:3]) >= 60 for name in after - before)


def valid_names(corpus):
  _, valid = sources.split(corpus, 0.2)
  return {corpus.names[i] for i in valid}


def test_recursive_globs_and_json_lines(tmp_path):
  for name in ('a/x.jsonl', 'a/b/y.jsonl'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(json.dumps({'text': name}) + '\n')
  corpus = sources.open_corpus(data('jsonl', tmp_path / '**' / '*.jsonl'))
  assert corpus.names == ['a/b/y.jsonl', 'a/x.jsonl']
  assert [corpus[0], corpus[1]] == corpus.names


def test_one_big_file_can_be_split(tmp_path):
  words = random.Random(0).choices(['alpha', 'beta', 'gamma\n'], k=20_000)
  (tmp_path / 'one.txt').write_text(' '.join(words))
  config = data(path=tmp_path / 'one.txt', document_bytes=4096)
  corpus = sources.open_corpus(config)
  train, valid = sources.split(corpus, 0.1)
  assert len(train) > 15 and len(valid) >= 1


def test_small_corpora_keep_one_document_for_validation(tmp_path):
  write_files(tmp_path, 2)
  corpus = sources.open_corpus(data(path=tmp_path / '*.txt'))
  train, valid = sources.split(corpus, 1e-9)
  assert len(train) == len(valid) == 1
  assert corpus.keys[valid[0]] < corpus.keys[train[0]]


def test_corpora_that_cannot_be_split_are_refused(tmp_path):
  write_files(tmp_path, 3)
  one = sources.open_corpus(data(path=tmp_path / '000.txt'))
  with pytest.raises(ValueError, match='has 1 document.*data.document_bytes'):
    sources.split(one, 0.5)
  three = sources.open_corpus(data(path=tmp_path / '*.txt'))
  with pytest.raises(ValueError, match='all 3 documents fall into the valid'):
    sources.split(three, np.nextafter(1.0, 0.0))
