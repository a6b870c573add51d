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
