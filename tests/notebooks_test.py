"""The notebooks run from top to bottom, and show what they say."""

import json
import pathlib

import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / 'notebooks'


def execute(name, folder):
  nbclient = pytest.importorskip('nbclient', reason='nbclient is missing')
  nbformat = pytest.importorskip('nbformat', reason='nbformat is missing')
  pytest.importorskip('ipykernel', reason='ipykernel is missing')
  notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
  assert not any(cell.get('outputs') for cell in notebook.cells)
  resources = {'metadata': {'path': str(folder)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()


def test_the_quickstart_notebook_trains_and_measures_its_memory(tmp_path):
  execute('quickstart.ipynb', tmp_path)

  numbers = json.loads((tmp_path / 'runs/notebook/memory.json').read_text())
  assert numbers['bits_per_byte'] < numbers['bigram'] - 0.1
  carried, forgotten = numbers['carried'], numbers['forgotten']
  # the kind of text, not the passage: the notebook says so
  assert carried[0] - carried[2] > 3 * numbers['gain_error']
  assert max(forgotten) - min(forgotten) < 1e-3


def test_the_night_of_sleep_keeps_the_days_and_the_core(tmp_path):
  execute('a_night_of_sleep.ipynb', tmp_path)

  lines = (tmp_path / 'runs/sleep/life/night.jsonl').read_text().splitlines()
  before, monday, tuesday = map(json.loads, lines)
  assert monday['accepted'] and tuesday['accepted']
  for day, night in enumerate((monday, tuesday)):
    # by slow weights alone, fast levels empty: a tenth less than before
    assert night['retention'][day] < 0.9 * before['retention'][day]
  assert tuesday['retention'][0] < before['retention'][0]
  assert tuesday['core'] < 1.15 * before['core']
