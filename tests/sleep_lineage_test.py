"""Every night is a line, whole or absent; its checkpoint comes first."""

import dataclasses

import pytest

from nestax.sleep import cycle
from nestax.sleep import lineage as lineage_
from nestax.sleep.gate import Decision
from nestax.sleep.lineage import Lineage, LineageError, Version
from nestax.sleep.tools import CycleConfig


def version(n, parent, accepted=True):
  return Version(n, parent, {'steps': 3}, {'core': 1.5}, accepted, 'why')


def test_the_lineage_remembers(tmp_path):
  lineage = Lineage(tmp_path / 'lineage.jsonl')
  assert lineage.current() is None
  for v in (version(0, -1), version(1, 0), version(2, 1, accepted=False)):
    lineage.add(v)
  again = Lineage(tmp_path / 'lineage.jsonl')
  assert [v.version for v in again.versions()] == [0, 1, 2]
  assert again.current().version == 1
  assert again.versions()[0].time
  assert dataclasses.replace(again.current(), time='') == version(1, 0)
  assert [p.name for p in tmp_path.iterdir()] == ['lineage.jsonl']


def test_a_line_that_cannot_be_is_refused_and_nothing_is_written(tmp_path):
  lineage = Lineage(tmp_path / 'lineage.jsonl')
  lineage.add(version(0, -1))
  lineage.add(version(1, 0, accepted=False))
  there = lineage.path.read_bytes()
  for bad, words in (
    (version(3, 0), 'the next is 2'),
    (version(2, 1), 'no accepted version'),
    (version(2, 7), 'no accepted version'),
  ):
    with pytest.raises(LineageError, match=words):
      lineage.add(bad)
  assert lineage.path.read_bytes() == there


def test_a_write_that_fails_leaves_the_lineage(tmp_path, monkeypatch):
  lineage = Lineage(tmp_path / 'lineage.jsonl')
  lineage.add(version(0, -1))
  there = lineage.path.read_bytes()

  def no_room(fd):
    raise OSError('no space left')

  monkeypatch.setattr(lineage_.os, 'fsync', no_room)
  with pytest.raises(OSError, match='no space'):
    lineage.add(version(1, 0))
  assert lineage.path.read_bytes() == there


def test_a_damaged_lineage_is_named(tmp_path):
  (tmp_path / 'x').write_text('{"version": 0}\n')
  with pytest.raises(LineageError, match='line 1: not a line of a lineage'):
    Lineage(tmp_path / 'x').versions()


def slept(accepted=True):
  decision = Decision(accepted, 'why')
  return cycle.Night(
    'params', None, decision, ('ann',), {'core': 1.0}, {'x': 2}
  )


def test_a_night_is_a_line_once_its_checkpoint_is_on_disk(tmp_path):
  lineage, how = Lineage(tmp_path / 'lineage.jsonl'), CycleConfig(every=3)

  def disk_full(number, params):
    raise OSError('no space left')

  with pytest.raises(OSError, match='no space'):
    lineage_.record(lineage, how, slept(), disk_full)
  assert lineage.versions() == []
  saved = []
  for accepted in (True, False, True):
    lineage_.record(
      lineage, how, slept(accepted), lambda *x: saved.append(x) or f'at {x[0]}'
    )
  versions = lineage.versions()
  assert saved == [(0, 'params'), (2, 'params')]
  assert [v.checkpoint for v in versions] == ['at 0', '', 'at 2']
  assert [v.parent for v in versions] == [-1, 0, 0]
  assert versions[0].config['every'] == 3
  assert versions[0].metrics == {'core': 1.0, 'seconds x': 2}
