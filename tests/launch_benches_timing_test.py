"""Timing: every run in turn, medians, ratios, tables, JSON lines."""

import itertools
import json
import time
import types

import numpy as np
import pytest

from nestax.launch.benches import timing


def test_runs_take_turns_and_every_other_round_goes_backwards():
  calls = []
  runs = {name: lambda n=name: calls.append(n) or 0.0 for name in 'ab'}
  seconds = timing.interleaved(runs, repeats=2, window=2, warmup=1)
  assert ''.join(calls) == 'aabb' + 'aabb' + 'bbaa'
  assert all(times.shape == (2, 2) for times in seconds.values())


def test_the_time_of_a_call_is_its_own():
  naps = iter([0.0, 0.0, 0.02, 0.0])
  runs = {'nap': lambda: time.sleep(next(naps)) or 0.0}
  seconds = timing.interleaved(runs, repeats=1, window=2, warmup=1)['nap']
  assert seconds[0, 0] > 0.02 > 0.01 > seconds[0, 1]


def test_the_median_is_over_windows_and_the_mean_within():
  seconds = np.array([[1.0, 3.0], [2.0, 4.0], [50.0, 50.0]])
  assert timing.median_ms(seconds) == 3000.0


def test_ratios_are_to_the_named_row():
  rows = [{'name': 'a', 'ms': 2.0}, {'name': 'b', 'ms': 3.0}]
  timing.add_ratios(rows, ['a'])
  assert [row['/ a'] for row in rows] == [1.0, 1.5]


def test_rows_are_shown_as_markdown_and_kept_as_json_lines(tmp_path, capsys):
  rows = [{'name': 'a', 'ms': 1.23456}, {'name': 'b', 'ms': None}]
  timing.show(rows, 'title')
  want = '| name | ms |\n| --- | --- |\n| a | 1.235 |\n| b | - |\n'
  assert capsys.readouterr().out == 'title\n\n' + want
  for _ in range(2):
    timing.append(rows, tmp_path / 'rows.jsonl')
  kept = [
    json.loads(line)
    for line in (tmp_path / 'rows.jsonl').read_text().splitlines()
  ]
  assert [row['ms'] for row in kept] == [1.23456, None] * 2
  assert 'JAX' in kept[0]['device']


@pytest.mark.parametrize('long, rounds', [(3.0, 2), (5.0, 0)])
def test_what_is_left_is_said_where_rounds_are_long(
  long, rounds, monkeypatch, capsys
):
  # a clock that goes on by a second whenever it is read
  clock = itertools.count(0.0, 1.0)
  monkeypatch.setattr(
    timing, 'time', types.SimpleNamespace(perf_counter=clock.__next__)
  )
  monkeypatch.setattr(timing, '_LONG', long)
  timing.interleaved({'nothing': lambda: 0.0}, repeats=3, warmup=0)
  want = ['round 1 of 3 is done, about 8 s', 'round 2 of 3 is done, about 4 s']
  said = capsys.readouterr().err.splitlines()
  assert said == [f'{words} are left' for words in want[:rounds]]
