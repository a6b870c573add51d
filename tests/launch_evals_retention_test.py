"""The report of nights: means over nights, spread over seeds."""

import matplotlib.image
import numpy as np
import pytest

from nestax.launch.evals import cells, retention


def life(method, seed, reads=True, nights=2, other=False, dreams=False):
  rows = [{'night': 0, 'core': 2.0, 'chance': 0.1, 'after': [0.1] * nights}]
  rows[0] |= {'other': 4.0} if other else {}
  for night in range(1, nights + 1):
    after = [0.4 - 0.1 * (night - i) for i in range(1, night)]
    row = {'night': night, 'core': 2.0 + 0.1 * night}
    row |= {'other': 4.0 + 0.1 * night} if other else {}
    row |= {'after': [*after, 0.5 + 0.1 * seed]}
    row |= {'before': 0.8} if reads else {}
    row['numbers'] = {'dream_paid': 0.25 * night} if dreams else {}
    row['seconds'] = {'read': 9.0, 'sleep': 7.0 if night == 1 else 3.0}
    rows.append(row)
  return [{'method': method, 'seed': seed} | row for row in rows]


def test_the_figures_of_a_life():
  got = retention.numbers(life('sleep', 0, dreams=True))
  want = {
    'before': 0.8,
    'after': 0.5,
    'kept': 0.625,
    'first': 0.5,
    'last': 0.3,
    'core first': 2.0,
    'core last': 2.2,
    'rise': 0.1,
    'helped': 0.375,
    'seconds': 3.0,  # reading, and the night that compiles, are left out
  }
  assert np.isnan(got.pop('held')) and np.isnan(got.pop('other'))
  assert got == pytest.approx(want)


def test_the_report_has_a_line_a_method_and_a_table_a_length(tmp_path):
  with pytest.raises(FileNotFoundError, match='no cells'):
    retention.write(tmp_path)
  for seed in (0, 1):
    path = tmp_path / 'cells' / f'sleep-2-{seed}.json'
    cells.write(path, {}, life('sleep', seed))
  tuned = life('fine-tuning', 0, reads=False, other=True)
  cells.write(tmp_path / 'cells' / 'fine-tuning-2-0.json', {}, tuned)
  cells.write(tmp_path / 'cells' / 'x-1-0.json', {}, life('x', 0, nights=1))
  words = retention.write(tmp_path)
  assert '| sleep | 0.800 ± 0.000 | 0.550 ± 0.071 | 69% ± 9% |' in words
  assert '| fine-tuning | - | 0.500 ± 0.000 | - |' in words
  assert '| 10.00% ± 0.00% | 5.00% ± 0.00% | - | 3.0 ± 0.0 |' in words
  assert words.index('2 nights, up to 2 seeds') < words.index('1 nights')
  assert (tmp_path / 'table.md').read_text() == words + '\n'
  assert len((tmp_path / 'rows.jsonl').read_text().splitlines()) == 11
  assert matplotlib.image.imread(tmp_path / 'nights.png').ndim == 3
