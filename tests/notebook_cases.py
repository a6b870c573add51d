"""Running a notebook from top to bottom."""

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
