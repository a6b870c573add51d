"""Pictures of a run."""

import os
from collections.abc import Sequence

from matplotlib import figure


def loss_curve(
  rows: Sequence[dict], path: str | os.PathLike, bigram: float, title: str
) -> None:
  """Draws bits per byte over the steps as a PNG.

  Args:
    rows: of `metrics.Log`; what was not finite leaves a gap.
    path: of the PNG.
    bigram: bits per byte of the validation bytes under their own bigrams.
    title: above the picture.
  """
  # Without pyplot: no window, no global state, no backend to choose.
  picture = figure.Figure(figsize=(7, 4.5), dpi=120, layout='constrained')
  axes = picture.add_subplot()
  for split, style in (
    ('train', {'linewidth': 0.8}),
    ('valid', {'marker': '.'}),
  ):
    points = [row for row in rows if row['split'] == split]
    axes.plot(
      [row['step'] for row in points],
      [_number(row['bits_per_byte']) for row in points],
      label=split,
      **style,
    )
  axes.axhline(bigram, color='grey', linestyle='--', label='bigram entropy')
  axes.set(xlabel='step', ylabel='bits per byte', title=title)
  axes.grid(alpha=0.3)
  axes.legend()
  picture.savefig(path)


def _number(value: float | None) -> float:
  return float('nan') if value is None else value
