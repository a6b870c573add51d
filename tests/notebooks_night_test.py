"""The notebook of nights runs from top to bottom, and shows what it says."""

import json

import launch_cases
import notebook_cases as cases
import pytest

pytestmark = pytest.mark.source


def test_the_night_of_sleep_keeps_the_days_and_the_core(tmp_path, monkeypatch):
  for name, value in launch_cases.QUICK.items():
    monkeypatch.setenv(name, value)
  cases.execute('a_night_of_sleep.ipynb', tmp_path)

  lines = (tmp_path / 'runs/sleep/life/night.jsonl').read_text().splitlines()
  before, monday, tuesday = map(json.loads, lines)
  assert monday['accepted'] and tuesday['accepted']
  for day, night in enumerate((monday, tuesday)):
    # by slow weights alone, fast levels empty: a tenth less than before
    assert night['retention'][day] < 0.9 * before['retention'][day]
  assert tuesday['retention'][0] < before['retention'][0]
  assert tuesday['core'] < 1.15 * before['core']
