"""The quickstart notebook runs from top to bottom, and shows what it says."""

import json

import notebook_cases as cases
import pytest

pytestmark = pytest.mark.source


def test_the_quickstart_notebook_trains_and_measures_its_memory(tmp_path):
  cases.execute('quickstart.ipynb', tmp_path)

  numbers = json.loads((tmp_path / 'runs/notebook/memory.json').read_text())
  assert numbers['bits_per_byte'] < numbers['bigram'] - 0.1
  carried, forgotten = numbers['carried'], numbers['forgotten']
  # the kind of text, not the passage: the notebook says so
  assert carried[0] - carried[2] > 3 * numbers['gain_error']
  assert max(forgotten) - min(forgotten) < 1e-3
