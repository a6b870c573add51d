"""A life of days and nights: read, slept, gone on with, forgotten."""

import shutil
import signal

import jax
import nights_cases as cases
import numpy as np
import pytest

from nestax.cms.experts import SlotsError
from nestax.launch import (
  checkpoint,
  days,
  forgetting,
  history,
  life,
  metrics,
  nights,
  plots,
  trained,
)
from nestax.launch.run import Interrupted
from nestax.sleep import consolidate, cycle, replay
from nestax.sleep.lineage import Lineage


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  return cases.write_texts(tmp_path_factory.mktemp('texts'))


@pytest.fixture(scope='module')
def whole(texts, tmp_path_factory):
  """A life of two days and two nights that nothing interrupted."""
  out = tmp_path_factory.mktemp('whole')
  nights.live(cases.plan(texts), out)
  return out


@pytest.fixture(autouse=True)
def undrawn(whole, monkeypatch):
  """Lives but the whole one draw nothing, which took a third of the time."""
  for name in ('retention', 'usage'):
    monkeypatch.setattr(plots, name, lambda *_: None)


def begun(plan, out):
  """A life as `live` opens it, with nobody to ask it to stop."""
  life = nights.Life(plan, out, Quiet(), Quiet())
  life.store.close()
  return life


class Quiet:
  received = 0

  def __init__(self):
    self.told = []

  def update(self, *words):
    self.told.append(words)

  def say(self, line):
    pass


def test_every_day_is_followed_by_a_night(whole):
  rows = cases.rows(whole)
  assert [row['night'] for row in rows] == [0, 1, 2]
  assert [row['after_day'] for row in rows] == ['', '1', '2']
  assert rows[1]['owners'] == ['ann', 'bob'] and rows[1]['accepted']
  # two slots a night for the slowest levels, none left in the fastest
  assert cases.used(rows) == [[0, 0], [0, 2], [0, 4]]
  version = Lineage(whole / 'lineage.jsonl').versions()[2]
  for levels in (rows[2]['levels'], version.metrics['levels']):
    assert list(levels) == ['every 4', 'every 8']
    assert levels['every 8']['written'] > 0
  assert all(list(row['retention']) == ['1', '2'] for row in rows)
  for name in ('retention.png', 'levels.png'):
    assert (whole / name).stat().st_size > 1000


def test_the_lineage_names_checkpoints_that_are_there(whole):
  versions = Lineage(whole / 'lineage.jsonl').versions()
  assert [(v.version, v.parent) for v in versions] == [(0, -1), (1, 0), (2, 1)]
  assert versions[0].reason == 'never slept'
  assert versions[2].config['seed']['steps'] == 8
  assert (whole / versions[2].checkpoint).is_dir()


def test_other_commands_load_the_newest_version(whole):
  got = trained.load(whole)
  assert got.model.cfg == cases.made().model.cfg
  slots = got.params['blocks']['level_1']['slots']
  assert int((np.asarray(slots['active'])[0] > 0).sum()) == 4
  assert not cases.same(got.params, cases.made().params)


def test_the_night_consolidates_what_both_owners_read(whole, texts):
  life = begun(cases.plan(texts), whole)
  assert life.past.day == 2 and life.past.replay.owners == []
  for level in life.being.state.levels.levels:
    assert not any(np.asarray(x).any() for x in level.delta)
  # 72 tokens of ann with the ends of the text, 47 of bob
  clock_B = np.asarray(life.being.state.levels.clock_B)
  assert clock_B.tolist() == [72, 47]


def test_a_life_that_is_over_has_nothing_more_to_do(whole, texts):
  before = cases.rows(whole)
  nights.live(cases.plan(texts), whole)
  assert cases.rows(whole) == before


def test_a_life_read_in_parts_is_the_same_to_the_bit(whole, texts, tmp_path):
  """Stopped in the first day, and in the second night."""
  plan, seen = cases.plan(texts), []

  def stop_at(life, times):
    ask = life._stop_if_asked

    def stop(saved=False):
      seen.append(saved)
      if len(seen) == times:
        life.signals.received = signal.SIGTERM
      ask(saved)

    life._stop_if_asked = stop

  for times in (3, 35):
    life = nights.Life(plan, tmp_path, show := Quiet(), Quiet())
    stop_at(life, times)
    with pytest.raises(Interrupted, match='SIGTERM: saved checkpoint'):
      life.go_on()
    life.store.close()
    assert seen[-1] == (times == 35)  # in a night
    if times == 3:  # shown is what all that was read of the day has cost
      read = life.past.replay.pieces()
      cost = sum(p.surprise * len(p.tokens) for p in read)
      mean = float(show.told[-1][-1].removesuffix(' nats a token'))
      assert abs(mean - cost / sum(len(p.tokens) for p in read)) < 1e-3
    seen.clear()
  nights.live(plan, tmp_path)
  assert cases.rows(tmp_path) == cases.rows(whole)
  a, b = begun(plan, tmp_path), begun(plan, whole)
  assert cases.same(a.being, b.being)
  assert a.past.replay.rows() == b.past.replay.rows()


def test_owners_do_not_see_each_other(texts, whole, tmp_path):
  """Ann's state is the same whether Bob reads beside her or is gone."""
  together = cases.plan(texts, nights=0)
  nights.live(together, tmp_path / 'both')
  both = begun(together, tmp_path / 'both')
  only = cases.plan(texts, nights=0, names=('ann',))
  nights.live(only, tmp_path / 'one')
  one = begun(only, tmp_path / 'one')
  mine = jax.tree.map(lambda x: x[:, :1], both.being.state.blocks)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    mine,
    one.being.state.blocks,
  )
  ann = both.past.replay.pieces(['ann'])
  assert [p.tokens for p in ann] == [
    p.tokens for p in one.past.replay.pieces(['ann'])
  ]
  assert sum(len(p.tokens) for p in ann) == 72
  assert all(5.4 < p.surprise < 5.9 for p in ann[:2])  # near ln(272) = 5.61


def test_a_day_is_read_again_and_slept_on_once(texts, tmp_path):
  once, again = (
    cases.plan(texts, count=1, nights=0, readings=n) for n in (1, 3)
  )
  nights.live(once, tmp_path / 'once')
  nights.live(again, tmp_path / 'again')
  a, b = begun(once, tmp_path / 'once'), begun(again, tmp_path / 'again')
  clocks = [np.asarray(x.being.state.levels.clock_B) for x in (a, b)]
  assert clocks[1].tolist() == (3 * clocks[0]).tolist()
  for name in ('ann', 'bob'):
    first, second = (
      [
        (token, round(piece.surprise, 3))
        for piece in x.past.replay.pieces([name])
        for token in piece.tokens
      ]
      for x in (a, b)
    )
    # what it cost is what it cost the first time
    assert first == second
  with pytest.raises(ValueError, match='leave out sleep_every=9, or read once'):
    cases.plan(texts, readings=2, sleep_every=9)


def test_nights_are_slept_when_asked(texts, tmp_path):
  nights.live(cases.plan(texts, nights=0), tmp_path)
  assert len(cases.rows(tmp_path)) == 1
  nights.live(cases.plan(texts, nights=1), tmp_path)
  rows = cases.rows(tmp_path)
  assert [row['after_day'] for row in rows] == ['', '2']
  nights.live(cases.plan(texts, nights=1), tmp_path)
  assert len(cases.rows(tmp_path)) == 2


def test_losses_that_an_older_life_kept_in_order_are_called_by_their_days():
  past = life.Past([], replay.Replay(1))
  past.rows = [{'retention': [1.0]}, {'retention': {'b': 2.0}}]
  history.name_days(past, [days.Day('a', {}), days.Day('b', {})])
  assert past.rows == [{'retention': {'a': 1.0}}, {'retention': {'b': 2.0}}]


def test_nights_fall_every_so_many_tokens(texts, tmp_path):
  nights.live(cases.plan(texts, sleep_every=30), tmp_path)
  # in the middle of both days, after 32 and 68 tokens of 72
  rows = cases.rows(tmp_path)
  assert [row['after_day'] for row in rows] == ['', '1', '2']
  assert rows[1]['retention'] != rows[2]['retention']


def test_no_night_that_may_not_be_slept_stops_the_reading(texts, tmp_path):
  nights.live(cases.plan(texts, nights=0), tmp_path / 'one')
  nights.live(cases.plan(texts, nights=0, sleep_every=16), tmp_path / 'other')
  one, other = (
    sorted(p.name for p in (tmp_path / name / 'checkpoints').iterdir())
    for name in ('one', 'other')
  )
  assert one == other


def test_a_predicate_is_asked_once_a_piece(texts, tmp_path, capsys):
  asked = []

  def new(piece):
    asked.append(piece)
    return asked.count(piece) == 1

  plan = cases.plan(texts, count=1)._replace(keep=(new,))
  nights.live(plan, tmp_path)
  assert 'no night' not in capsys.readouterr().out
  assert len(cases.rows(tmp_path)) == 2
  assert len({id(piece) for piece in asked}) == len(asked)


def test_an_owner_who_is_not_chosen_keeps_fast_levels_and_replay(
  texts, tmp_path
):
  plan = cases.plan(texts, count=1, only=['bob'])
  nights.live(plan, tmp_path)
  life = begun(plan, tmp_path)
  assert cases.rows(tmp_path)[1]['owners'] == ['bob']
  assert life.past.replay.owners == ['ann']
  delta = life.being.state.levels.levels[0].delta
  assert all(x[:, 0].any() and not x[:, 1].any() for x in delta)


def test_what_is_too_surprising_is_not_slept_on(texts, tmp_path, capsys):
  nights.live(cases.plan(texts, count=1, surprise=1.0), tmp_path)
  assert 'no night: nothing to consolidate' in capsys.readouterr().out
  assert len(cases.rows(tmp_path)) == 1


def test_what_contradicts_the_slow_levels_stays_in_the_fast_ones(
  tmp_path, capsys, monkeypatch
):
  """Half of what ann reads is garbage, and all that bob does."""
  folder = cases.write_texts(tmp_path / 'texts')
  good, garbage = 'abcab  ' + 'cab cbba' * 3, 'XZ~7%Q^&' * 3
  (folder / 'ann.txt').write_text(good + garbage)
  (folder / 'bob.txt').write_text(garbage)
  plan = cases.plan(folder, count=1, disagreement=3.5)
  likely = np.zeros((plan.made.model.cfg.V, 1), np.float32)
  likely[list(b'abc ')] = 6.0
  embed = plan.made.params['embed']['embedding'] + likely * np.eye(8)[:1]
  params = plan.made.params | {'embed': {'embedding': embed}}
  plan = plan._replace(made=plan.made._replace(params=params))
  slept_on, night = [], nights.owners.night
  monkeypatch.setattr(
    nights.owners,
    'night',
    lambda *how: slept_on.append(how[3]) or night(*how),
  )
  nights.live(plan, tmp_path / 'life')
  said = capsys.readouterr().out
  assert '6 of 10 pieces of what was read are not slept on' in said
  assert 'left out by filters: 6 of 10 pieces' in said
  spent = metrics.read(tmp_path / 'life' / 'night.jsonl')[1]['seconds']
  assert list(spent)[0] == 'filters' and spent['filters'] > 0
  first, second = Lineage(tmp_path / 'life' / 'lineage.jsonl').versions()
  assert second.config['life']['disagreement'] == 3.5
  assert second.config['life']['surprise'] is None
  assert (second.metrics['pieces'], second.metrics['left_out']) == (10, 6)
  (day,) = slept_on
  assert day.names == ('ann',)
  rows = zip(day.read[0].tokens_BxL, day.read[0].length_B)
  bos, *said = [x for tokens, n in rows for x in tokens[:n]]
  assert bytes(said).decode() == good
  life = begun(plan, tmp_path / 'life')
  assert life.past.replay.owners == ['bob']
  delta = life.being.state.levels.levels[0].delta
  assert all(x[:, 1].any() and not x[:, 0].any() for x in delta)


def test_a_life_that_has_slept_all_days_says_so(whole, texts, tmp_path, capsys):
  shutil.copytree(whole, tmp_path / 'life')
  nights.live(cases.plan(texts), tmp_path / 'life')
  words = 'nothing to do: days slept on: 2 of 2; another day with --text'
  assert words in capsys.readouterr().out


def test_a_life_whose_nights_are_slept_says_what_is_left(
  texts, tmp_path, capsys
):
  plan = cases.plan(texts, count=1, nights=0)
  for nothing in (False, True):
    nights.live(plan, tmp_path)
    said = capsys.readouterr().out
    words = 'nothing to do: days read: 1 of 1, nights slept: 0; --nights=1'
    assert (words in said) == nothing


def test_nothing_of_a_forgotten_owner_is_left(texts, tmp_path, capsys):
  plan = cases.plan(texts, count=1, nights=0)
  nights.live(plan, tmp_path)
  old = begun(plan, tmp_path)
  forgetting.forget(tmp_path, 'ann')
  assert "ann's state and replay buffer are deleted" in capsys.readouterr().out
  new, fresh = begun(plan, tmp_path), old._born()
  assert new.past.replay.owners == ['bob'] and new.past.present == ['bob']
  for a, b, c in zip(
    *(jax.tree.leaves(x.state.blocks) for x in (new.being, fresh, old.being))
  ):
    np.testing.assert_array_equal(a[:, 0], b[:, 0])
    np.testing.assert_array_equal(a[:, 1], c[:, 1])
  assert not new.being.state.levels.clock_B[0]
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['3']
  with pytest.raises(ValueError, match='--forget=ann: there is no such owner'):
    forgetting.forget(tmp_path, 'ann')
  # goes on without her, even without her file
  bob = cases.plan(texts, count=1, nights=1, names=('bob',))
  nights.live(bob, tmp_path)
  assert cases.rows(tmp_path)[-1]['owners'] == ['bob']


def test_another_life_is_not_gone_on_with(whole, texts, tmp_path):
  other = cases.write_texts(tmp_path / 'other')
  (other / 'bob.txt').write_text('something else')
  with pytest.raises(ValueError, match='day 1 of bob was begun with another'):
    nights.live(cases.plan(other), whole)
  with pytest.raises(ValueError, match='2 days were begun'):
    nights.live(cases.plan(texts, count=1), whole)
  plan = cases.plan(texts)
  called = plan._replace(days=(plan.days[0]._replace(name='9'), *plan.days[1:]))
  with pytest.raises(ValueError, match='day 9 was begun as day 1'):
    nights.live(called, whole)
  with pytest.raises(checkpoint.OtherConfigError, match='life.window is 8'):
    nights.live(cases.plan(texts, window=16), whole)
  both = cases.plan(texts, names=('ann', 'bob', 'core'))
  with pytest.raises(ValueError, match="'core' is new"):
    nights.live(both, whole)


def test_a_night_without_room_is_slept_when_there_is(
  texts, whole, tmp_path, monkeypatch
):
  night = cycle.night

  def full(*args):
    raise SlotsError('all slots are used up')

  monkeypatch.setattr(cycle, 'night', full)
  for _ in range(2):
    with pytest.raises(SlotsError):
      nights.live(cases.plan(texts), tmp_path)
    assert len(cases.rows(tmp_path)) == 1
  monkeypatch.setattr(cycle, 'night', night)
  nights.live(cases.plan(texts), tmp_path)
  assert cases.rows(tmp_path) == cases.rows(whole)


def test_forgetting_that_was_cut_off_is_done_when_asked_again(
  texts, tmp_path, monkeypatch
):
  nights.live(cases.plan(texts, nights=0), tmp_path)

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(life.Store, 'forget_others', killed)
    with pytest.raises(KeyboardInterrupt):
      forgetting.forget(tmp_path, 'ann')
  there = tmp_path / 'checkpoints'
  newest = max(int(path.name) for path in there.iterdir())
  assert len(list(there.iterdir())) > 1
  with pytest.raises(ValueError, match='there is no such owner'):
    forgetting.forget(tmp_path, 'ann')
  assert [path.name for path in there.iterdir()] == [str(newest)]


def test_a_life_goes_on_without_all_that_named_who_was_forgotten(
  texts, tmp_path, monkeypatch
):
  out, mine = tmp_path / 'life', tmp_path / 'texts'
  shutil.copytree(texts, mine)
  plan = cases.plan(mine, nights=0)
  nights.live(plan._replace(days=plan.days[:1]), out)
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'bytes').write_text('named like the tokenizer')
  forgetting.forget(out, 'ann')
  (out / 'night.jsonl').unlink()
  nights.live(cases.plan(mine, nights=0, names=('bob',)), out)
  being = begun(cases.plan(mine, nights=0, names=('bob',)), out)
  assert being.past.present == ['bob'] and being.past.owners == ['ann', 'bob']
  assert being.past.day == 2


def test_of_what_a_forgotten_owner_would_read_nothing_is_kept(texts, tmp_path):
  plan = cases.plan(texts, nights=0)
  nights.live(plan._replace(days=plan.days[:1]), tmp_path)
  forgetting.forget(tmp_path, 'ann')
  nights.live(plan, tmp_path)  # her file is there still
  marks = begun(plan, tmp_path).past.marks
  assert [list(of) for of in marks] == [['bob'], ['bob']]


@pytest.mark.parametrize(
  'scope, words',
  [
    ('shared', 'the same command with --set=night.full=merge goes on'),
    ('owner', 'nothing is lost: a life with more --slots begins in another'),
  ],
)
def test_a_night_without_room_says_how_to_go_on(
  scope, words, texts, tmp_path, monkeypatch
):
  def full(*_):
    raise SlotsError('all slots are used up')

  monkeypatch.setattr(cycle, 'check_room', full)
  plan = cases.plan(texts, count=1, scope=scope)
  with pytest.raises(SlotsError, match=f'all slots are used up.*{words}'):
    nights.live(plan, tmp_path)


@pytest.mark.parametrize(
  'lost, words',
  [
    (0.471, 'the same command with --set=night.lost=0.48 goes on, or a life'),
    (1.004, 'a life with more --slots begins in another --out'),
  ],
)
def test_a_merge_that_loses_too_much_says_how_to_go_on(
  lost, words, texts, tmp_path, monkeypatch
):
  def loses(*_):
    raise consolidate.MergeError('too much would be lost', lost)

  monkeypatch.setattr(cycle, 'night', loses)
  with pytest.raises(SlotsError, match=f'be lost.* nothing is lost: {words}'):
    nights.live(cases.plan(texts, count=1), tmp_path)


@pytest.mark.slow
def test_owners_with_slots_of_their_own_sleep_alone_and_take_them_along(
  texts, tmp_path
):
  plan = cases.plan(texts, scope='owner')
  nights.live(plan, tmp_path)
  life = begun(plan, tmp_path)
  rows = cases.rows(tmp_path)
  assert rows[1]['owners'] == ['ann', 'bob'] and rows[1]['accepted']
  assert cases.used(rows) == [[0, 0], [0, 2], [0, 4]]
  assert cases.same(life.being.params, plan.made.params)
  # what each says of a day is by slots of their own
  assert rows[1]['retention']['1'] != rows[0]['retention']['1']
  held = life.being.state.owned[1].active_S
  assert np.asarray(held).sum(-1).tolist() == [[4, 4]] * 2
  forgetting.forget(tmp_path, 'ann')
  held = np.asarray(begun(plan, tmp_path).being.state.owned[1].active_S)
  assert held.sum(-1).tolist() == [[0, 4]] * 2
