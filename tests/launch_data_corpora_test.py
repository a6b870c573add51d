"""Corpora give every byte of their files back, and name the bad ones."""

import io
import json
import pickle
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from nestax.launch.data import corpora

LINES = [{'text': 'one'}, {'text': 'zwei \u00e4', 'n': 2}, {'text': ''}]

GOLDEN_KEYS = ['868933af04b294d9', 'ae2b99061389e270', '284ea9e2be68d944']


def texts(corpus):
  return [corpus[i] for i in range(len(corpus))]


def array_record(path, records):
  module = pytest.importorskip('array_record.python.array_record_module')
  writer = module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()


@hypothesis.given(
  text=st.text(st.sampled_from('ab\n\r\u00e9\u20ac\U0001f600'), max_size=200),
  size=st.integers(16, 40),
)
@hypothesis.example(text='a' * 14 + '\u20ac', size=16)
@hypothesis.settings(max_examples=200, deadline=None)
def test_pieces_of_a_file_are_the_file(tmp_path_factory, text, size):
  root = tmp_path_factory.mktemp('pieces')
  (root / 'a.txt').write_bytes(b'x' + text.encode())
  corpus = corpora.TextFiles(str(root), ['a.txt'], size)
  assert ''.join(texts(corpus)) == 'x' + text
  assert corpus.sizes.sum() == 1 + len(text.encode())
  assert max(len(t.encode()) for t in texts(corpus)) < 2 * size


def test_long_files_are_cut_at_line_ends(tmp_path):
  text = ''.join(f'line {i}\n' for i in range(100))
  (tmp_path / 'a.txt').write_text(text)
  pieces = texts(corpora.TextFiles(str(tmp_path), ['a.txt'], 64))
  assert len(pieces) > 10
  assert all(piece.endswith('\n') for piece in pieces)


def test_short_files_are_whole_and_empty_ones_left_out(tmp_path):
  for name, text in {'a': 'alpha\nbeta\n', 'b': '', 'c': 'gamma'}.items():
    (tmp_path / name).write_text(text)
  corpus = corpora.TextFiles(str(tmp_path), ['a', 'b', 'c'], 1024)
  assert texts(corpus) == ['alpha\nbeta\n', 'gamma']
  assert len(set(corpus.keys.tolist())) == 2


def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path):
  bad = b'good line\n' * 10 + b'caf\xe9 au lait\n' + b'more\n' * 10
  (tmp_path / 'bad.txt').write_bytes(bad)
  for size in (None, 32):
    corpus = corpora.TextFiles(str(tmp_path), ['bad.txt'], size)
    with pytest.raises(ValueError, match=r'bad\.txt.*0xe9 at offset 103'):
      texts(corpus)


@pytest.mark.parametrize('end', ['\n', ''], ids=['newline', 'no newline'])
def test_json_lines_gives_the_lines_that_are_not_blank(tmp_path, end):
  lines = [json.dumps(LINES[0]), '', json.dumps(LINES[1]), '\r']
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines) + '\n' + '{"text":""}')
  (tmp_path / 'b.jsonl').write_text('')
  (tmp_path / 'c.jsonl').write_text('{"text": "c"}' + end)
  names = ['a.jsonl', 'b.jsonl', 'c.jsonl']
  corpus = corpora.JsonLines(str(tmp_path), names, 'text')
  assert texts(corpus) == ['one', 'zwei \u00e4', '', 'c']
  assert len(set(corpus.keys.tolist())) == 4
  assert texts(pickle.loads(pickle.dumps(corpus))) == texts(corpus)


@pytest.mark.parametrize(
  'line, words',
  [
    (b'{"text": 3}', 'has no string under .*; that is of type int'),
    (
      b'{"body": "x"}',
      r"no string under data\.text_key='text'; it has \['body'\]",
    ),
    (b'[1, 2, 3]', 'has no string under .*; it is a list, no object'),
    (b'{"text": "x"', "is not JSON.*text say data.source='text'"),
    (b'{"text": "\xff"}', 'not UTF-8: byte 0xff at offset 10'),
    (b'{"text": "\\ud800"}', 'not valid Unicode'),
  ],
)
def test_bad_json_lines_are_named_with_file_and_line(tmp_path, line, words):
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "fine"}\n\n' + line + b'\n')
  corpus = corpora.JsonLines(str(tmp_path), ['a.jsonl'], 'text')
  assert corpus[0] == 'fine'
  with pytest.raises(corpora.DataError, match=r'a\.jsonl:3.*' + words) as bad:
    corpus[1]
  assert "text_key=''" not in str(bad.value)  # is for ArrayRecords


@pytest.mark.parametrize('block', [3, 7, 1 << 20])
def test_lines_of_white_space_are_blank(tmp_path, monkeypatch, block):
  text = ' \n{"text": "a"}\n\t \r\n  {"text": "b"}\r\n\n{"text": "c"}\n  '
  (tmp_path / 'a').write_bytes(text.encode())
  read = io.BufferedReader.read

  class Small(io.BufferedReader):
    def read(self, size=-1):
      return read(self, min(size, block) if size > 0 else size)

  monkeypatch.setattr(
    corpora, 'open', lambda p, m: Small(io.FileIO(p)), raising=False
  )
  corpus = corpora.JsonLines(str(tmp_path), ['a'], 'text')
  monkeypatch.undo()
  assert texts(corpus) == ['a', 'b', 'c']
  assert corpus.sizes.tolist() == [14, 17, 14]


def test_a_byte_order_mark_is_no_text(tmp_path):
  (tmp_path / 'a').write_text('{"text": "one"}\n{"text": "two"}', 'utf-8-sig')
  (tmp_path / 'b').write_text('one line\n' * 9, 'utf-8-sig')
  (tmp_path / 'c').write_bytes(b'\xef\xbb\xbf')
  corpus = corpora.JsonLines(str(tmp_path), ['a', 'c'], 'text')
  assert texts(corpus) == ['one', 'two']
  for size in (None, 32):
    corpus = corpora.TextFiles(str(tmp_path), ['b'], size)
    assert ''.join(texts(corpus)) == 'one line\n' * 9


def test_array_records_of_json_and_of_text(tmp_path):
  array_record(tmp_path / 'a', [json.dumps(x).encode() for x in LINES])
  array_record(tmp_path / 'b', [b'{"text": "four"}'])
  corpus = corpora.ArrayRecords(str(tmp_path), ['a', 'b'], 'text')
  assert texts(corpus) == ['one', 'zwei \u00e4', '', 'four']
  assert texts(pickle.loads(pickle.dumps(corpus))) == texts(corpus)
  plain = corpora.ArrayRecords(str(tmp_path), ['b'], '')
  assert texts(plain) == ['{"text": "four"}']


def test_bad_array_records_are_named(tmp_path):
  array_record(tmp_path / 'a', [b'plain words'])
  with pytest.raises(ValueError, match=r"a record 0 is not JSON.*text_key=''"):
    corpora.ArrayRecords(str(tmp_path), ['a'], 'text')[0]
  (tmp_path / 'c').write_bytes(b'no such thing')
  with pytest.raises(ValueError, match='is not an ArrayRecord file'):
    corpora.ArrayRecords(str(tmp_path), ['c'], 'text')


def test_array_record_missing_is_said(tmp_path, monkeypatch):
  (tmp_path / 'a').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'array_record.python', None)
  with pytest.raises(ValueError, match='needs the package array-record'):
    corpora.ArrayRecords(str(tmp_path), ['a'], 'text')


def test_keys_are_the_same_for_ever():
  """Other numbers here would mix old validation text into training text."""
  keys = corpora._keys(['a.txt', 'b/c.txt'], np.array([1, 2]))
  assert [f'{key:016x}' for key in keys.tolist()] == GOLDEN_KEYS


def test_fingerprint_tells_another_corpus(tmp_path):
  (tmp_path / 'a').write_text('alpha')
  (tmp_path / 'b').write_text('beta')

  def fingerprint(*names):
    return corpora.TextFiles(str(tmp_path), names, 64).fingerprint

  before = fingerprint('a', 'b')
  assert fingerprint('a', 'b') == before
  assert fingerprint('a') != before
  (tmp_path / 'b').write_text('betas')
  assert fingerprint('a', 'b') != before


@pytest.mark.parametrize('index', [-1, 2])
def test_no_document_outside_the_corpus(tmp_path, index):
  (tmp_path / 'a').write_text('alpha')
  (tmp_path / 'b').write_text('beta')
  with pytest.raises(IndexError):
    corpora.TextFiles(str(tmp_path), ['a', 'b'], 64)[index]
