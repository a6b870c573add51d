"""A night's row, its table and its pictures."""

import io
import json
import math

from rich import console

from nestax.launch import by_level, report
from nestax.launch import sleep as program
from nestax.sleep import cycle
from nestax.sleep.gate import Decision

PERIODS = (4, 8)


def slept(**metrics):
  numbers = {
    'core_before': 2.0,
    'core_after': 2.01,
    'day_before': 4.0,
    'day_dusk': 3.0,
    'day_after': 3.25,
    'written_0': 1.5,
    'written_1': 0.5,
    'divergence_0_first': 0.25,
    'divergence_0': 0.125,
    'divergence_1_first': math.nan,
    'divergence_1': 0.0625,
    'slots_0': 0,
    'slots_1': 2,
    **metrics,
  }
  seconds = {'compute': 0.5, 'gate': 61.25}
  return cycle.Night(
    None, None, Decision(True, 'accepted: fine'), ('ann',), numbers, seconds
  )


def printed(row):
  out = io.StringIO()
  report.show_night(row, PERIODS, console.Console(width=100, file=out))
  return out.getvalue()


def test_a_row_is_plain_and_what_is_not_finite_is_null():
  kept = {'1': 1.0, '2': None}
  row = report.night_row(3, slept(), '2', kept, [0, 2], 6)
  again = json.loads(json.dumps(row, allow_nan=False))
  assert again == row and row['metrics']['divergence_1_first'] is None
  assert (row['night'], row['after_day'], row['slots']) == (3, '2', 6)
  assert (row['core'], row['used']) == (2.01, [0, 2])
  assert row['retention'] == kept and row['owners'] == ['ann']


def test_a_night_that_was_rolled_back_leaves_the_core_as_it_was():
  night = slept()._replace(decision=Decision(False, 'rolled back'))
  row = report.night_row(3, night, '2', {}, [0, 0], 6)
  assert (row['core'], row['accepted']) == (2.0, False)
  assert '0 of 6' in printed(row) and '2 of 6' not in printed(row)


def test_the_table_says_what_went_where_and_what_it_cost():
  night = slept(lost_1=0.125, kept_1=0.02, rehearsed=48)
  row = report.night_row(3, night, '2', {}, [0, 2], 6)
  said = printed(row)
  for words in (
    'night 3, after day 2',
    'every 4',
    '0.25 -> 0.125',
    '2 of 6',
    'yes, 12.5% lost',
    'core loss 2.0000 -> 2.0100',
    '4.0000 without the night, 3.0000 with fast levels, 3.2500 by slow',
    'accepted: fine',
    'its own texts and 48 rehearsed rows, divergence 0.02 (every 8)',
    'compute 0.5 s, gate 61.2 s; 61.8 s in all',
  ):
    assert words in said, words
  assert 'dreams' not in said


def test_help_says_what_is_in_the_table_and_in_progress():
  row = report.night_row(3, slept(), '2', {}, [0, 2], 6)
  said, words = printed(row), program.__doc__
  for name in ('goes to', 'had written', 'divergence', 'slots used', 'merged'):
    assert name in said and f'\n  {name} ' in words, name
  for name in ('on_policy_divergence', 'reward', 'gradient', 'kept'):
    assert name in words, name


def test_levels_that_were_not_due_and_dreams_are_named():
  night = slept(dream_paid=0.5, dream_before=-2.0, dream_after=-1.5)
  for name in ('written_1', 'divergence_1', 'divergence_1_first'):
    del night.metrics[name]
  said = printed(report.night_row(1, night, '1', {}, [0, 2], 6))
  assert 'not due' in said
  assert 'dreams: 50% helped; score -2.000 -> -1.500' in said


def test_what_is_known_is_told_by_level_and_by_day():
  known = {'asked': 12, 'chance': 0.25, 'slow': 0.125, 'dusk': 0.875}
  known |= {'morning': 0.75, 'alone_0': 0.5, 'alone_1': 0.375, 'without_1': 0.2}
  night = slept(**{f'recall_{name}': value for name, value in known.items()})
  row = {'morning': {'mon': 0.75, '': 1.0}}
  said = printed(report.night_row(1, night, 'mon', {}, [0, 2], 6, row))
  for words in (
    'slept on (12 questions, chance 25%): 88% with fast levels, 12% -> 75% by',
    'by one level alone: every 4 50%, every 8 38%; after the night without the '
    'slots of one: every 8 20%',
    'recall by slow weights alone: day mon 75%, of no day 100%',
  ):
    assert words in said, words
  assert 'recall' not in printed(
    report.night_row(1, slept(), '', {}, [0, 2], 6)
  )


def test_the_files_are_written_anew(tmp_path):
  first = report.night_row(0, slept(), '', {'1': 4.0}, [0, 2], 6)
  rows = [
    first,
    report.night_row(1, slept(), '1', {'1': 3.0, '2': None}, [0, 2], 6),
  ]
  report.write(tmp_path, rows, ['1', '2'], PERIODS)
  report.write(tmp_path, rows, ['1', '2'], PERIODS)
  lines = (tmp_path / 'night.jsonl').read_text().splitlines()
  told = [by_level.row(row, PERIODS) for row in rows]
  assert [json.loads(line) for line in lines] == told
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'levels.png', 'night.jsonl', 'retention.png'
  ]  # fmt: skip


def test_where_there_is_no_terminal_progress_is_a_line_now_and_then(
  capsys, monkeypatch
):
  now = iter([100.0, 101.0, 102.0, 125.0])
  monkeypatch.setattr(report.time, 'monotonic', lambda: next(now))
  with report.Show() as show:
    show.update('day 1', 0, 40)
    show.update('day 1', 8, 40, '2.5 nats')  # too soon
    show.update('night 1', 1, 9)
    show.update('night 1', 8, 9, 'kept 0.1')
    show.say('done')
  said = capsys.readouterr()
  assert said.err.splitlines() == [
    'day 1: 0/40', 'night 1: 1/9', 'night 1: 8/9, kept 0.1'
  ]  # fmt: skip
  assert said.out == 'done\n'
