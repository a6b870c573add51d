"""The quickstart notebook runs from top to bottom, and shows what it says."""

import json

import launch_cases
import notebook_cases as cases
import pytest

pytestmark = pytest.mark.source


EVERY = 'config.log.every = 25\n'


def test_the_quickstart_notebook_runs(tmp_path, monkeypatch):
  """Of 30 steps: a model that has learned letters, and no more."""
  changes = (
    EVERY,
    'config.log.every = 5; config.train.steps, config.opt.warmup = 30, 3\n'
    'config.data.update(length=64, valid_batches=1); config.train.batch = 8\n',
  )
  for name, value in launch_cases.QUICK.items():
    monkeypatch.setenv(name, value)
  fewer = ('[table() for _ in range(64)]', '[table() for _ in range(8)]')
  shorter = ('prompt, 300, how', 'prompt, 30, how')
  cases.execute('quickstart.ipynb', tmp_path, changes, fewer, shorter)
  numbers = json.loads((tmp_path / 'runs/notebook/memory.json').read_text())
  assert numbers['bits_per_byte'] < 6
  assert len(numbers['carried']) == 3 and numbers['gain_error'] > 0
  assert max(numbers['forgotten']) - min(numbers['forgotten']) < 1e-3


@pytest.mark.slow
def test_the_quickstart_notebook_trains_and_measures_its_memory(tmp_path):
  cases.execute('quickstart.ipynb', tmp_path)
  numbers = json.loads((tmp_path / 'runs/notebook/memory.json').read_text())
  assert numbers['bits_per_byte'] < numbers['bigram'] - 0.1
  carried, forgotten = numbers['carried'], numbers['forgotten']
  # the kind of text, not the passage: the notebook says so
  assert carried[0] - carried[2] > 3 * numbers['gain_error']
  assert max(forgotten) - min(forgotten) < 1e-3
