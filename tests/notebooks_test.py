"""The quickstart notebook runs from top to bottom."""

import json
import pathlib

import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / 'notebooks'


def test_the_quickstart_notebook_trains_and_measures_its_memory(tmp_path):
  nbclient = pytest.importorskip('nbclient', reason='nbclient is missing')
  nbformat = pytest.importorskip('nbformat', reason='nbformat is missing')
  pytest.importorskip('ipykernel', reason='ipykernel is missing')
  notebook = nbformat.read(NOTEBOOKS / 'quickstart.ipynb', as_version=4)
  assert not any(cell.get('outputs') for cell in notebook.cells)

  resources = {'metadata': {'path': str(tmp_path)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()

  numbers = json.loads((tmp_path / 'runs/notebook/memory.json').read_text())
  assert numbers['bits_per_byte'] < numbers['bigram'] - 0.1
  carried, forgotten = numbers['carried'], numbers['forgotten']
  # the kind of text, not the passage: the notebook says so
  assert carried[0] - carried[2] > 3 * numbers['gain_error']
  assert max(forgotten) - min(forgotten) < 1e-3
