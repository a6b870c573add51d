"""The notebook of nights runs from top to bottom, and shows what it says."""

import json

import launch_cases
import notebook_cases as cases
import pytest

pytestmark = pytest.mark.source


CHANGES = (
  ("'N': 2, 'H': 2}", "'N': 1, 'H': 2}"),
  # compiles in half the time
  (
    "config.name = 'sleeper'",
    "config.name, config.optimizer = 'sleeper', 'adamw'",
  ),
)


@pytest.mark.parametrize(
  'changes',
  [
    pytest.param(CHANGES, id='one block'),
    pytest.param((), id='as it stands', marks=pytest.mark.slow),
  ],
)
def test_the_night_of_sleep_keeps_the_days_and_the_core(
  changes, tmp_path, monkeypatch
):
  for name, value in launch_cases.QUICK.items():
    monkeypatch.setenv(name, value)
  cases.execute('a_night_of_sleep.ipynb', tmp_path, *changes)

  lines = (tmp_path / 'runs/sleep/life/night.jsonl').read_text().splitlines()
  before, monday, tuesday = map(json.loads, lines)
  assert monday['accepted'] and tuesday['accepted']
  for day, night in (('monday', monday), ('tuesday', tuesday)):
    # by slow weights alone, fast levels empty: a tenth less than before
    assert night['retention'][day] < 0.9 * before['retention'][day]
  assert tuesday['retention']['monday'] < before['retention']['monday']
  assert tuesday['core'] < 1.15 * before['core']
