"""Questions about days as tasks to dream about."""

import dataclasses
import json
import types

import nights_cases as cases
import numpy as np
import pytest

from nestax.launch import nights, studies
from nestax.launch.days import Day
from nestax.launch.questions import Question
from nestax.sleep.dream import DreamConfig
from nestax.sleep.replay import Piece

BYTES = cases.made().tokenizer
IDS = np.arange(60, dtype=np.int32)
PAIRS = [('ann', '1'), ('ann', '2'), ('bob', '2')]
HOW = DreamConfig(length=20, answer=12)


def asked(count, **how):
  return [Question(f'q{i}', f'a{i}', **how) for i in range(count)]


def test_questions_in_the_order_of_the_text_are_asked_about_its_pieces():
  bos = np.array([BYTES.bos])
  read = [Day('mon', {'ann': IDS, 'bob': np.append(bos, IDS[:5])})]
  some = asked(6, day='mon', owner='ann') + asked(1, day='mon', owner='bob')
  first, second, other = studies.of('f', some, read, BYTES, HOW)
  assert (first.owner, other.owner, other.day) == ('ann', 'bob', 'mon')
  assert first.context() == (BYTES.bos, *range(9))
  assert second.context() == (BYTES.bos, *range(51, 60))
  assert other.context() == (BYTES.bos, *range(5))
  pairs = [*first.questions(), *second.questions()]
  assert [bytes(q[1:]) + bytes(a) for q, a in pairs] == [
    f'q{i} a{i}'.encode() for i in range(6)
  ]
  assert len(first.questions()) == 3


def test_what_cannot_be_dreamt_about_is_refused(tmp_path):
  read = [Day('mon', {'ann': IDS})]
  with pytest.raises(ValueError, match="dream=f: 'q0' is of no day"):
    studies.of('f', asked(1, owner='ann'), read, BYTES, HOW)
  long = [Question('q' * 20, 'a', (), 'mon', 'ann')]
  with pytest.raises(
    ValueError, match='day mon of ann, task 0: question 0 has'
  ):
    studies.of('f', long, read, BYTES, HOW)
  texts, path = cases.write_texts(tmp_path), tmp_path / 'q.jsonl'
  row = {'question': 'Who?', 'answer': 'I', 'day': '1', 'owner': 'ann'}
  path.write_text(json.dumps(row))
  with pytest.raises(ValueError, match="'Who.' is asked by --questions too"):
    cases.plan(texts, asked=str(path), dream=str(path))
  with pytest.raises(ValueError, match='would be dreamt about by all'):
    cases.plan(texts, scope='owner', dream=str(path))
  path.write_text('[]')
  with pytest.raises(
    ValueError, match='^dream=.*q.jsonl, line 1: .* no object'
  ):
    cases.plan(texts, dream=str(path))


def test_a_night_dreams_about_the_day_that_it_sleeps_on(tmp_path, monkeypatch):
  texts, path = cases.write_texts(tmp_path), tmp_path / 'q.jsonl'
  rows = [
    {'question': 'a', 'answer': 'b', 'day': day, 'owner': name}
    for name, day in PAIRS
  ]
  path.write_text('\n'.join(map(json.dumps, rows)))
  plan, given = cases.plan(texts, dream=str(path)), []

  class Enough(Exception):
    pass

  def night(tools, params, state, day, core, number, key, tell, tasks, *past):
    given.append([(x.owner, x.day) for x in tasks])
    raise Enough

  monkeypatch.setattr(nights.owners, 'night', night)
  monkeypatch.setattr(nights.history, 'retention', lambda *how: {})
  quiet = types.SimpleNamespace(
    received=0, say=lambda line: None, update=lambda *words: None
  )
  life = nights.Life(plan, tmp_path / 'life', quiet, quiet)
  text = {day.name: day.tokens for day in plan.days}
  read = [
    Piece(x, tuple(map(int, text[day][x])), 0.0, f'day {day}')
    for x, day in PAIRS
  ]
  for pieces, want in ((read[:1], PAIRS[:1]), (read[1:], PAIRS[1:])):
    life.past.replay.clear()
    for piece in pieces:
      life.past.replay.add(piece)
    with pytest.raises(Enough):
      life.sleep()
    assert given.pop() == want
  # nor about what a filter has left out, of which only a part is slept on
  cut = dataclasses.replace(read[2], tokens=read[2].tokens[:5])
  life.past.replay.clear()
  for piece in (*read[:2], cut):
    life.past.replay.add(piece)
  life.plan = plan._replace(keep=(lambda piece: piece.mark != 'day 1',))
  with pytest.raises(Enough):
    life.sleep()
  assert given.pop() == PAIRS[1:2]
  life.past.replay.clear()
  for piece in read:
    life.past.replay.add(piece)
  life.plan = plan._replace(only=('bob',))
  with pytest.raises(Enough):
    life.sleep()
  assert given.pop() == [('bob', '2')]
  life.store.close()
