"""The picture of a run."""

import matplotlib.image
import numpy as np

from nestax.launch import plots


def test_the_loss_curve_is_a_png_with_both_curves_and_the_bigram(tmp_path):
  rows = [
    {'step': step, 'split': split, 'bits_per_byte': 8.0 / step}
    for step in range(1, 9)
    for split in ('train', 'valid')
  ]
  rows[4]['bits_per_byte'] = None
  plots.loss_curve(rows, tmp_path / 'loss.png', 3.0, 'small')
  full = matplotlib.image.imread(tmp_path / 'loss.png')
  plots.loss_curve([], tmp_path / 'empty.png', 3.0, 'small')
  empty = matplotlib.image.imread(tmp_path / 'empty.png')
  assert full.shape == empty.shape == (540, 840, 4)
  assert np.abs(full - empty).max() > 0.5


def test_what_is_known_of_each_day_is_drawn_below_its_losses(tmp_path):
  row = {'night': 0, 'core': 1.0, 'retention': {'a': 3.0, 'b': None}}
  known = {'morning': {'b': 0.2}, 'dusk': None}
  later = {'morning': {'b': 0.6}, 'dusk': {'b': 0.9}}
  other = {'morning': {'b': 0.6}, 'dusk': {'b': 0.1}}
  pictures = []
  for recalls in ((known, later), (known, other), (later, other), ()):
    rows = [row | {'night': i, 'recall': x} for i, x in enumerate(recalls)]
    plots.retention(rows or [row, row], ['a', 'b'], tmp_path / 'r.png')
    pictures.append(matplotlib.image.imread(tmp_path / 'r.png'))
  first, *others, without = pictures
  assert first.shape == (960, 840, 4) and without.shape == (540, 840, 4)
  above = first[:400]
  for other in others:
    assert np.abs(first - other).max() > 0.5
    assert np.abs(above - other[:400]).max() < 0.01


def test_what_levels_did_in_training_is_drawn_level_by_level(tmp_path):
  rows = [
    {'step': step, 'split': 'valid'}
    | {
      f'level_{k}_{name}': step * (k + 1.0)
      for k in range(2)
      for name in ('rate', 'moved', 'size')
    }
    for step in (1, 2, 3)
  ]
  alike = [
    row | {f'level_1_{name}': row['step'] for name in ('rate', 'moved', 'size')}
    for row in rows
  ]
  pictures = []
  for shown, periods in ((rows, (4, 8)), (alike, (4, 8)), ([], (4, 8))):
    plots.trained_levels(shown, periods, tmp_path / 'l.png', 'small')
    pictures.append(matplotlib.image.imread(tmp_path / 'l.png'))
  for other in pictures[1:]:
    assert np.abs(pictures[0] - other).max() > 0.5


def drawn(monkeypatch, draw, *args):
  """The axes that a picture is made of."""
  pictures, save = [], plots.figure.Figure.savefig
  monkeypatch.setattr(
    plots.figure.Figure,
    'savefig',
    lambda picture, path: pictures.append(picture) or save(picture, path),
  )
  draw(*args)
  (picture,) = pictures
  return picture.axes


def test_levels_of_one_validation_are_told_apart(tmp_path, monkeypatch):
  row = {'step': 60, 'split': 'valid', 'surprise': 1.9} | {
    f'level_{k}_{name}': 1.0
    for k in range(3)
    for name in ('rate', 'moved', 'size')
  }
  levels = plots.trained_levels, [row], (4, 8, 16), tmp_path / 'l.png', 'small'
  axes = drawn(monkeypatch, *levels)
  assert [x.get_title().split(':')[0] for x in axes] == [
    'inner learning rate', 'last update', 'all that is written', 'surprise'
  ]  # fmt: skip
  assert all(x.get_xlim()[0] == 0 for x in axes)
  for lines in (x.lines for x in axes[:3]):
    assert len({line.get_marker() for line in lines}) == 3
    sizes = [line.get_markersize() for line in lines]
    assert sizes == sorted(set(sizes), reverse=True)
  assert axes[3].lines[0].get_ydata() == [1.9]


def test_without_a_surprise_it_has_no_panel(tmp_path, monkeypatch):
  row = {'step': 60, 'level_0_rate': 1, 'level_0_moved': 1, 'level_0_size': 1}
  levels = plots.trained_levels, [row], (4,), tmp_path / 'l.png', 'small'
  assert len(drawn(monkeypatch, *levels)) == 3


def test_each_panel_of_nights_has_a_title(tmp_path, monkeypatch):
  rows = [{'night': 1, 'metrics': {'written_0': 1.0}, 'used': [0, 2]}]
  usage = plots.usage, rows, (4, 8), tmp_path / 'u.png'
  above, below = drawn(monkeypatch, *usage)
  assert above.get_title().startswith('what levels had written')
  assert below.get_title().startswith('slots')
  assert len({line.get_marker() for line in below.lines}) == 2
