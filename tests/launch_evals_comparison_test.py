"""Learning rates are picked by one rule; tables and plots say what came."""

import math

import matplotlib.image
import pytest

from nestax.launch.evals import cells, comparison


def rows_of(name, ends, suite='vit', seeds=2):
  """Rows at two steps; `ends` maps a rate to its last validation loss."""
  return [
    {
      'suite': suite,
      'optimizer': name,
      'rate': rate,
      'seed': seed,
      'step': step,
      'train': 1.0,
      'valid loss': None if end is None else end + (step == 5) + 0.1 * seed,
      'test loss': 2.0,
    }
    for rate, end in ends.items()
    for seed in range(seeds)
    for step in (5, 10)
  ]


def test_the_rate_with_the_lowest_mean_at_the_end_is_picked():
  rows = rows_of('m3', {0.1: 3.0, 0.2: 1.0, 0.4: 2.0})
  assert comparison.pick(rows, 'valid loss') == (0.2, False)


def test_an_end_of_the_grid_is_told():
  rows = rows_of('m3', {0.1: 1.0, 0.2: 2.0})
  assert comparison.pick(rows, 'valid loss') == (0.1, True)


def test_a_rate_at_which_a_seed_diverged_is_not_picked():
  rows = rows_of('m3', {0.1: 3.0, 0.2: 2.0, 0.4: 2.5})
  rows[5 * 1 + 0]['valid loss'] = None  # 0.2, seed 0, the last step
  assert comparison.pick(rows, 'valid loss') == (0.4, True)


def test_the_bound_has_to_hold_until_the_end():
  rows = rows_of('m3', {0.1: 1.0}, seeds=1)
  assert comparison.stays_below(rows, 'valid loss', 1.5) == 10
  assert comparison.stays_below(rows, 'valid loss', 2.5) == 5
  assert comparison.stays_below(rows, 'valid loss', 0.5) is None
  rows[0]['valid loss'] = 0.1  # for a moment only, below a bound of 0.5
  assert comparison.stays_below(rows, 'valid loss', 0.5) is None


def test_table_plot_and_rows_are_written(tmp_path):
  for name, ends in (
    ('adamw', {0.1: 3.0, 0.2: 2.0, 0.4: None}),
    ('m3', {0.1: 3.0, 0.2: 1.0, 0.4: 2.0}),
  ):
    path = tmp_path / 'cells' / f'vit-{name}.json'
    cells.write(path, {'suite': 'vit'}, rows_of(name, ends))
    time = {'suite': 'vit', 'optimizer': name, 'ms_per_step': 4.0}
    cells.write(path.with_stem(f'{path.stem}-time'), {}, [time])
  words = comparison.write(tmp_path)
  assert words + '\n' == (tmp_path / 'table.md').read_text()
  assert '| m3 | 0.2 | 1.0500 ± 0.0707 |' in words
  assert words.index('| m3 |') < words.index('| adamw |')  # best first
  assert '| adamw | 3.05 | 2.05 | nan |' in words
  assert '| 10 | 4 | 0.04 |' in words
  rows = (tmp_path / 'rows.jsonl').read_text().splitlines()
  assert len(rows) == 2 * 3 * 2 * 2
  assert matplotlib.image.imread(tmp_path / 'curves.png').std() > 0.01


def test_what_was_not_timed_is_reported_all_the_same(tmp_path):
  rows = rows_of('adamw', {0.1: 3.0, 0.2: 2.0, 0.4: 2.5})
  cells.write(tmp_path / 'cells/vit-adamw.json', {'suite': 'vit'}, rows)
  assert '| adamw | 0.2 |' in comparison.write(tmp_path)
  assert (tmp_path / 'curves.png').exists()


def test_nothing_to_report_is_said(tmp_path):
  with pytest.raises(FileNotFoundError, match='train first'):
    comparison.write(tmp_path)


def test_what_diverged_everywhere_is_last_and_nan():
  rows = rows_of('m3', {0.1: None, 0.2: None})
  rate, _ = comparison.pick(rows, 'valid loss')
  assert math.isnan(comparison.final(rows, rate, 'valid loss').mean())


@pytest.mark.parametrize(
  ('name', 'other'), [('seeds', 5), ('steps', 20), ('data', 'mnist.npz')]
)
def test_cells_of_other_settings_make_no_table(tmp_path, name, other):
  key = {'seeds': 3, 'steps': 10, 'rates': [0.1, 0.2], 'data': ''}
  rows = rows_of('adamw', {0.1: 3.0, 0.2: 2.0})
  cells.write(tmp_path / 'cells/vit-adamw.json', key, rows)
  cells.write(
    tmp_path / 'cells/vit-m3.json',
    key | {name: other},
    rows_of('m3', {0.1: 3.0, 0.2: 2.0}),
  )
  with pytest.raises(cells.CellError, match=f'vit-adamw.* of {name}=.*vit-m3'):
    comparison.write(tmp_path)


def test_times_on_other_data_make_no_table(tmp_path):
  rows = rows_of('adamw', {0.1: 3.0, 0.2: 2.0})
  cells.write(tmp_path / 'cells/vit-adamw.json', {'data': ''}, rows)
  time = {'suite': 'vit', 'optimizer': 'adamw', 'ms_per_step': 4.0}
  path = tmp_path / 'cells/vit-adamw-time.json'
  cells.write(path, {'data': 'mnist.npz'}, [time])
  with pytest.raises(cells.CellError, match='data='):
    comparison.write(tmp_path)


def test_one_seed_has_no_deviation(tmp_path):
  rows = rows_of('adamw', {0.1: 3.0, 0.2: 2.0}, seeds=1)
  cells.write(tmp_path / 'cells/vit-adamw.json', {}, rows)
  assert '| 0.2 (edge) | 2.0000 |' in comparison.write(tmp_path)
