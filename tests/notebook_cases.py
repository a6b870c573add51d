"""Running a notebook from top to bottom."""

import pathlib

import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / 'notebooks'


def execute(name, folder, *changes):
  """Runs all cells.

  Args:
    name: of the notebook.
    folder: to run in.
    changes: pairs of what stands in a cell and what is to stand there.
  """
  nbclient = pytest.importorskip('nbclient', reason='nbclient is missing')
  nbformat = pytest.importorskip('nbformat', reason='nbformat is missing')
  pytest.importorskip('ipykernel', reason='ipykernel is missing')
  notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
  assert not any(cell.get('outputs') for cell in notebook.cells)
  for old, new in changes:
    (cell,) = [cell for cell in notebook.cells if old in cell.source]
    cell.source = cell.source.replace(old, new)
  resources = {'metadata': {'path': str(folder)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
