"""What nights are given to rehearse; nothing learns here."""

import random
import types
from typing import NamedTuple

import jax
import nights_cases as cases
import numpy as np
import pytest

from nestax.launch import forgetting, history, life, nights, rehearsal
from nestax.launch.run import Interrupted
from nestax.models import model_state
from nestax.sleep import cycle, gate, owners
from nestax.sleep.reader import Said
from nestax.sleep.replay import Replay
from nestax.sleep.texts import Day


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = cases.write_texts(tmp_path_factory.mktemp('texts'))
  rng = random.Random(1)
  for name in ('one', 'two'):
    (folder / f'{name}.novel').write_text(''.join(rng.choices('xyz ', k=155)))
  return folder


class Quiet:
  received = 0

  def update(self, *words):
    pass

  def say(self, line):
    pass


@pytest.fixture
def slept(monkeypatch):
  """What each night was given, as (day, rows kept); nothing is computed."""
  seen = []

  def read(model, params, state, logits_BxV, tokens_BxL, reads_B):
    return state, logits_BxV, np.ones(tokens_BxL.shape)

  def night(
    tools, params, state, day, core, number, key, tell, tasks, past
  ):  # fmt: skip
    seen.append((day, past))
    decision = gate.Decision(True, '')
    metrics = {'core_after': 1.0}
    return cycle.Night(params, state, decision, day.names, metrics, {})

  monkeypatch.setattr(life, 'read', read)
  monkeypatch.setattr(cycle, 'night', night)
  monkeypatch.setattr(history.gate, 'loss', lambda *a: 1.0)
  monkeypatch.setattr(history, 'write', lambda *a: None)
  monkeypatch.setattr(nights.report, 'show_night', lambda *a: None)
  monkeypatch.setattr(
    life, 'where_owners', lambda mask, new, old: old
  )  # of which launch_nights_test.py sees that it is right
  return seen


def plan(texts, **options):
  options = {'rehearsed': 6, 'earlier': 3} | options
  paths = [str(texts / '*.novel')]
  return cases.plan(texts, rehearse=paths, **options)


def lines(said):
  # what begins and ends a text is no byte
  rows = zip(said.tokens_BxL, said.length_B)
  return [''.join(map(chr, row[:n])) for row, n in rows]


def begun(plan, out):
  life_ = nights.Life(plan, out, Quiet(), Quiet())
  life_.store.close()
  return life_


def live(plan, out):
  nights.live(plan, out)
  return begun(plan, out).past


def test_nights_rehearse_texts_and_all_owners_earlier_days(
  texts, tmp_path, slept, monkeypatch
):
  past = live(plan(texts), tmp_path / 'whole')
  (day, first), (_, second) = slept
  known = {
    (texts / f'{name}.novel').read_text()[i : i + 10]
    for name in ('one', 'two')
    for i in range(0, 150, 10)
  }
  first, second = lines(first), lines(second)
  assert len(set(first)) == 6 and set(first) <= known
  assert len(set(second[:6])) == 6 and set(second[:6]) <= known
  assert first != second[:6]  # drawn anew
  mine = [lines(read) for read in day.read]
  assert len(second) == 12 and len(set(second[6:])) == 6
  assert set(second[6:9]) <= set(mine[0]) and set(second[9:]) <= set(mine[1])
  # all that was slept on is held for the nights to come, and nobody else's
  assert past.replay.owners == [] and past.earlier.owners == ['ann', 'bob']
  assert past.earlier.held('ann') == 72

  # stopped in the second night, and gone on with
  want, night = slept[:], cycle.night
  del slept[:]

  def stop(*given):
    if len(slept) == 1:
      raise Interrupted('SIGTERM', 15)
    return night(*given)

  monkeypatch.setattr(cycle, 'night', stop)
  with pytest.raises(Interrupted):
    live(plan(texts), tmp_path / 'parts')
  monkeypatch.setattr(cycle, 'night', night)
  again = live(plan(texts), tmp_path / 'parts')
  assert cases.same([x for _, x in slept], [x for _, x in want])
  assert again.earlier.rows() == past.earlier.rows()

  # and nothing is left of who is forgotten
  forgetting.forget(tmp_path / 'parts', 'ann')
  gone = begun(plan(texts), tmp_path / 'parts').past
  assert gone.earlier.owners == ['bob']
  (saved,) = (tmp_path / 'parts' / 'checkpoints').iterdir()
  assert int(saved.name) == gone.step
  # a life that holds nothing any more, but for what it has not slept on
  begun_ = begun(plan(texts, earlier=0), tmp_path / 'parts')
  begun_._remember(day, ['bob'])
  assert begun_.past.earlier.owners == []


def test_owners_with_slots_of_their_own_rehearse_no_others_days(
  slept, monkeypatch
):
  class State(NamedTuple):
    owned: tuple | None

  for module, name in (
    (owners, 'personal'),
    (owners, 'keep'),
    (model_state, 'take_row'),
    (model_state, 'put_row'),
  ):
    monkeypatch.setattr(module, name, lambda *a: State(()))
  monkeypatch.setattr(owners, 'check', lambda *a: None)
  tools = types.SimpleNamespace(cfg=None, how=types.SimpleNamespace(full=''))
  day = Day((0, 1, 2), ('ann', 'bob', 'cid'), (said(0, 2),) * 3)
  earlier = {'ann': said(100, 2), 'bob': said(200, 3)}

  def kept(state, past, earlier=earlier):
    del slept[:]
    key = jax.random.key(0)
    given = tools, {}, state, day, None, 2, key, None, (), past, earlier
    owners.night(*given)
    return [rows and rows.tokens_BxL[:, 0].tolist() for _, rows in slept]

  mine, ours, past = State(()), State(None), said(900, 2)
  ann, bob = [100, 101], [200, 201, 202]
  assert kept(mine, None) == [ann, bob, None]
  both = [900, 901]
  assert kept(mine, past) == [both + ann, both + bob, both]
  assert kept(ours, past) == [both + ann + bob]
  assert kept(ours, None, None) == [None]


def test_without_texts_and_earlier_days_nothing_is_rehearsed_or_held(
  texts, tmp_path, slept
):
  past = live(cases.plan(texts), tmp_path)
  assert [rows for _, rows in slept] == [None, None]
  assert past.earlier.owners == []


def said(first, rows):
  tokens = np.arange(first, first + rows)[:, None].repeat(4, 1)
  return Said(tokens, np.ones(rows, int), np.full(rows, 4))


def test_what_is_held_of_earlier_days_is_bounded_and_of_all_days_alike():
  held = Replay(40)
  for night in range(1, 5):
    day = Day((0,), ('ann',), (said(100 * night, 10),))
    rehearsal.remember(held, day, ['ann'], 0, night)
    assert held.held('ann') <= 40

  def nights_of(held):
    return [p.tokens[0] // 100 for p in held.pieces()]

  found = nights_of(held)
  assert [found.count(n) for n in range(1, 5)] in (
    [2, 3, 3, 2], [3, 3, 2, 2], [3, 2, 3, 2], [2, 2, 3, 3], [3, 2, 2, 3],
    [2, 3, 2, 3],
  )  # fmt: skip
  rehearsal.remember(held, day._replace(names=('bob',)), ['ann'], 0, 5)
  assert held.owners == ['ann']  # bob's night was taken back
  rehearsal.bound(held, 16, 0, 5)
  assert nights_of(held) == [1, 2, 3, 4] and held.capacity == 16
  rows = rehearsal.earlier(held, ['ann', 'bob'], 9, 4, 0, 0, 5)
  tokens = rows['ann'].tokens_BxL
  assert list(rows) == ['ann'] and tokens.shape == (9, 4)
  assert len(set(tokens[:, 0])) == 4  # again only when all were taken
  assert Replay.of_rows(held.rows()).rows() == held.rows()


def test_what_is_drawn_is_of_the_seed_and_the_night():
  lots = [(0, 1), (0, 1), (1, 1), (0, 2)]
  first, again, seed, night = (
    rehearsal.drawn(said(0, 500), 9, *lot).tokens_BxL.tolist() for lot in lots
  )
  assert first == again and first != seed and first != night
  every = rehearsal.drawn(said(0, 50), 50, 0, 1).tokens_BxL[:, 0]
  assert sorted(every.tolist()) == [*range(50)]  # no row again before others
  held = Replay(400)
  day = Day((0, 1), ('ann', 'bob'), (said(0, 40),) * 2)
  rehearsal.remember(held, day, ['ann', 'bob'], 0, 1)

  def earlier(*lot):
    rows = rehearsal.earlier(held, ['ann', 'bob'], 9, 4, 0, *lot)
    return [rows[name].tokens_BxL[:, 0].tolist() for name in ('ann', 'bob')]

  first, again, seed, night = (earlier(*lot) for lot in lots)
  assert first == again and first != seed and first != night
  assert first[0] != first[1]


def test_rows_beyond_what_is_held_go_at_random():
  day = Day((0, 1), ('ann', 'bob'), (said(0, 40),) * 2)

  def left(*lot):
    held = Replay(80)  # of 160 tokens an owner
    rehearsal.remember(held, day, ['ann', 'bob'], *lot)
    return [[p.tokens[0] for p in held.pieces([x])] for x in ('ann', 'bob')]

  def bounded(*lot):
    held = Replay(160)
    rehearsal.remember(held, day, ['ann', 'bob'], 0, 1)
    rehearsal.bound(held, 80, *lot)
    return [[p.tokens[0] for p in held.pieces([x])] for x in ('ann', 'bob')]

  for thinned in (left, bounded):
    (ann, bob), again = thinned(0, 1), thinned(0, 1)
    assert len(ann) == len(bob) == 20 and [ann, bob] == again
    assert ann == sorted(ann) and min(ann) < 10 and max(ann) > 29
    apart = [ann, bob, thinned(1, 1)[0], thinned(0, 2)[0]]
    assert len({*map(tuple, apart)}) == 4


def test_texts_that_cannot_be_rehearsed_are_refused(texts, tmp_path):
  (tmp_path / 'short').write_text('xyzxyzxyz')
  core = (texts / 'core.txt').read_text()
  (tmp_path / 'longer').write_text(f'zzz{core}zzz')
  (tmp_path / 'part').write_text(core[20:40])
  bob = (texts / 'bob.txt').read_text()
  (tmp_path / 'diary').write_text(f'zzz{bob}zzz')
  (tmp_path / 'page').write_text(bob[5:25])
  (tmp_path / 'blank').write_text('\n' * 20)
  one = str(texts / 'one.novel')
  for path, words in (
    (texts / 'core.txt', 'core.txt has the text of --core'),
    (tmp_path / 'longer', 'longer has the text of --core'),
    (tmp_path / 'part', 'part has the text of --core'),
    (texts / 'bob.txt', 'bob.txt is what bob reads'),
    (tmp_path / 'diary', 'diary is what bob reads'),
    (tmp_path / 'page', 'page is what bob reads'),
    (tmp_path / 'short', 'short: 9 tokens, shorter than a row of 10 tokens'),
    (tmp_path / 'blank', 'blank: nothing to read in it'),
    (tmp_path / 'none*', 'none.: there is no such file'),
    (tmp_path, 'is a folder: give files'),
  ):
    with pytest.raises((ValueError, OSError), match=words):
      cases.plan(texts, rehearse=[one, str(path)])
  for options, words in (
    ({'rehearsed': 0}, 'rehearsed=0: at least 1'),
    ({'earlier': -1}, 'earlier=-1: at least 0'),
    ({'held': 1}, 'held=1: at least 2'),
  ):
    with pytest.raises(ValueError, match=words):
      cases.plan(texts, **options)
  # a few letters that are a short day may stand in it
  (tmp_path / 'letters').write_text(f'xyzxyz{bob[:5]}xyzxyz')
  cases.plan(texts, count=9, rehearse=[str(tmp_path / 'letters')])
  both = cases.plan(texts, rehearse=[one, one])
  assert len(both.rehearsed.length_B) == 15  # a file named twice is read once
