"""Files become days of owners; what is read next hangs on lengths alone."""

import numpy as np
import pytest

from nestax.launch import days
from nestax.launch.data import tokenizers

BYTES = tokenizers.load('bytes')


def write(folder, **texts):
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in texts.items():
    (folder / f'{name}.txt').write_text(text)
  return str(folder / '*.txt')


def test_files_are_days_of_one_reader(tmp_path):
  words = {'b': 'two', 'a': 'one', 'b10': 'ten', 'b9': 'nine'}
  read = days.load([write(tmp_path, **words)], 0, BYTES)
  assert [day.name for day in read] == ['a', 'b', 'b9', 'b10']
  assert days.owners(read) == ('reader',)
  np.testing.assert_array_equal(
    read[0].tokens['reader'], BYTES.document('one')[0]
  )


def test_files_are_owners_if_they_are_cut_into_days(tmp_path):
  read = days.load([write(tmp_path, ann='abcdefgh', bob='xyz')], 3, BYTES)
  assert [day.name for day in read] == ['1', '2', '3']
  assert days.owners(read) == ('ann', 'bob')
  for name, text in (('ann', 'abcdefgh'), ('bob', 'xyz')):
    whole = np.concatenate([day.tokens[name] for day in read])
    np.testing.assert_array_equal(whole, BYTES.document(text)[0])
    sizes = [len(day.tokens[name]) for day in read]
    assert max(sizes) - min(sizes) <= 1


def test_folders_are_days_and_their_files_owners(tmp_path):
  write(tmp_path / 'day2', ann='later')
  write(tmp_path / 'day1', ann='first', bob='first')
  (tmp_path / 'day1' / '.hidden').write_text('no owner')
  read = days.load([str(tmp_path / 'day*')], 0, BYTES)
  assert [day.name for day in read] == ['day1', 'day2']
  assert [sorted(day.tokens) for day in read] == [['ann', 'bob'], ['ann']]
  assert days.owners(read) == ('ann', 'bob')


@pytest.mark.parametrize('readings', [1, 3])
def test_calls_read_all_of_everybody_in_two_shapes(readings):
  lengths = {'ann': 21, 'bob': 8, 'cid': 3}
  day = days.Day('1', {k: np.arange(n) + 1 for k, n in lengths.items()})
  names, done, read = ['ann', 'bob', 'cid', 'gone'], {}, {}
  shapes = set()
  while (call := days.call(day, names, done, 8, readings)) is not None:
    shapes.add(call.tokens_BxL.shape)
    assert call.reads_B.any()
    for row, name in enumerate(names):
      if call.reads_B[row]:
        read.setdefault(name, []).extend(call.tokens_BxL[row])
        done[name] = done.get(name, 0) + call.tokens_BxL.shape[1]
      else:
        assert not call.tokens_BxL[row].any()
  assert shapes == {(4, 8), (4, 1)}
  assert read == {k: [*range(1, n + 1)] * readings for k, n in lengths.items()}
  assert done == {k: n * readings for k, n in lengths.items()}
  assert days.left(day, names, done, readings) == [0] * 4
  assert days.left(day, names, lengths, 2) == [*lengths.values(), 0]


def test_a_mark_changes_with_the_text():
  one = days.Day('1', {'ann': np.array([1, 2]), 'bob': np.array([3])})
  two = days.Day('1', {'ann': np.array([1, 3]), 'bob': np.array([3])})
  a, b = days.mark(one), days.mark(two)
  assert a['bob'] == b['bob'] and a['ann'] != b['ann']


def test_what_cannot_be_days_is_refused(tmp_path):
  pattern = write(tmp_path / 'texts', ann='abc')
  with pytest.raises(FileNotFoundError, match='nothing.txt: there is no such'):
    days.load([str(tmp_path / 'nothing.txt')], 0, BYTES)
  with pytest.raises(ValueError, match='is a folder and .* a file'):
    days.load([str(tmp_path / 'texts'), pattern], 0, BYTES)
  with pytest.raises(ValueError, match='--days=2 is for files'):
    days.load([str(tmp_path / 'texts')], 2, BYTES)
  write(tmp_path / 'more', ann='again')
  with pytest.raises(ValueError, match="'ann' is the name of two"):
    days.load([pattern, str(tmp_path / 'more/*')], 1, BYTES)
  (tmp_path / 'bare').mkdir()
  (tmp_path / 'bare' / '.hidden').write_text('no owner')
  with pytest.raises(ValueError, match='a day without a file'):
    days.load([str(tmp_path / 'bare')], 0, BYTES)
  empty = write(tmp_path / 'empty', ann=' \n')
  with pytest.raises(ValueError, match='nothing to read in it'):
    days.load([empty], 0, BYTES)
