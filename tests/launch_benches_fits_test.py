"""Which cells are compiled, in what order, and what the table shows."""

import pytest

from nestax.launch import fit
from nestax.launch.benches import fits

CELLS = [fits.Cell('tiny', 64, 'v5e:4x4'), fits.Cell('tiny', 128, 'v5e:4x4')]


def test_a_row_a_chip_or_shared():
  cell = fits.Cell('tiny', 64, 'v5p:8x8x16')
  words = fits.words(cell, fits.Trial(4), 128)
  asked = dict(word.split('=') for word in words)
  assert asked['--config.train.batch'] == '256'
  mesh = [asked[f'--config.mesh.{a}'] for a in ('data', 'fsdp', 'tensor')]
  assert mesh == ['2', '128', '4']
  assert fits.words(cell, fits.Trial(4, 'dots'), 128, 'O2') == [
    *words, '--config.model.remat=dots', '--effort=O2'
  ]  # fmt: skip
  with pytest.raises(ValueError, match='v5e:2x2 has 4 chips'):
    fits.words(fits.Cell('tiny', 64, 'v5e:2x2'), fits.Trial(3), 4)


def test_cells_are_tried_until_they_fit_and_never_twice(tmp_path):
  path, ran = tmp_path / 'cells.jsonl', []

  def run(asked, path):
    given = dict(word.split('=') for word in asked)
    tensor = int(given['--config.mesh.tensor'])
    length = int(given['--config.data.length'])
    remat = given['--config.model.remat']
    ran.append((length, tensor, remat))
    need = length / tensor / (1 + (remat == 'full'))
    row = dict.fromkeys(fits.COLUMNS, 0) | {'step ms': 1.0, 'bound': 'HBM'}
    row |= {'asked': asked, 'length': length, 'total GiB': need}
    fit.append(row | {'HBM GiB': 32, 'fits': need <= 32}, path)

  trials = [
    fits.Trial(n, remat) for n in (1, 2, 4) for remat in ('dots', 'full')
  ]
  rows = fits.fill(CELLS, trials, 16, path, run, 'O1')
  # recomputing more is tried before sharing a row
  first = [(64, 1, 'dots'), (64, 1, 'full')]
  assert ran == [*first, (128, 1, 'dots'), (128, 1, 'full'), (128, 2, 'dots'),
                 (128, 2, 'full')]  # fmt: skip
  assert [row['total GiB'] for row in fits.table(rows)] == [32, 32]
  assert all('--effort=O1' in row['asked'] for row in rows)
  assert fits.fill(CELLS, trials, 16, path, run, 'O1') == rows
  assert len(ran) == 6
  # what never fits is not in the table
  rows = fits.fill(CELLS, trials[:2], 16, path, run, 'O1')
  assert [row['length'] for row in fits.table(rows)] == [64]


def test_a_refused_cell_ends_it_in_the_commands_words(tmp_path):
  words = ['--config=tiny', '--topology=v9:2x2']
  with pytest.raises(ValueError, match='v9:2x2: one of'):
    fits.compile_cell(words, tmp_path / 'cells.jsonl')
