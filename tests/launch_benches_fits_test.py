"""Which cells are compiled, in what order, and what the table shows."""

import pytest

from nestax.launch import fit
from nestax.launch.benches import fits

CELLS = [fits.Cell('tiny', 64, 'v5e:4x4'), fits.Cell('tiny', 128, 'v5e:4x4')]


def test_a_row_a_chip_or_shared():
  cell = fits.Cell('tiny', 64, 'v5p:8x8x16')
  asked = dict(word.split('=') for word in fits.words(cell, 4, 128))
  assert asked['--config.train.batch'] == '256'
  mesh = [asked[f'--config.mesh.{a}'] for a in ('data', 'fsdp', 'tensor')]
  assert mesh == ['2', '128', '4']
  with pytest.raises(ValueError, match='v5e:2x2 has 4 chips'):
    fits.words(fits.Cell('tiny', 64, 'v5e:2x2'), 3, 4)


def test_cells_are_tried_until_they_fit_and_never_twice(tmp_path):
  path, ran = tmp_path / 'cells.jsonl', []

  def run(asked, path):
    given = dict(word.split('=') for word in asked)
    tensor = int(given['--config.mesh.tensor'])
    length = int(given['--config.data.length'])
    ran.append((length, tensor))
    row = dict.fromkeys(fits.COLUMNS, 0) | {'step ms': 1.0, 'bound': 'HBM'}
    row |= {'asked': asked, 'length': length, 'total GiB': length / tensor}
    fit.append(row | {'HBM GiB': 64, 'fits': length / tensor <= 64}, path)

  rows = fits.fill(CELLS, (1, 2, 4), 16, path, run)
  assert ran == [(64, 1), (128, 1), (128, 2)]
  assert [row['total GiB'] for row in fits.table(rows)] == [64, 64]
  assert fits.fill(CELLS, (1, 2, 4), 16, path, run) == rows and len(ran) == 3
  # what never fits is not in the table
  rows = fits.fill(CELLS, (1,), 16, path, run)
  assert [row['length'] for row in fits.table(rows)] == [64]


def test_a_refused_cell_ends_it_in_the_commands_words(tmp_path):
  words = ['--config=tiny', '--topology=v9:2x2']
  with pytest.raises(ValueError, match='v9:2x2: one of'):
    fits.compile_cell(words, tmp_path / 'cells.jsonl')
