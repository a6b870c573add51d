"""What a chip can do at most, by its maker's word, and how long work takes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from nestax.launch import metrics
from nestax.launch.costs import Costs

GIB = 2**30


class Peaks(NamedTuple):
  """Of one chip.

  Attributes:
    flops: FLOP/s of bfloat16 matrix products.
    memory: bytes of HBM.
    memory_rate: bytes/s from and to HBM.
    link_rate: bytes/s that it sends to other chips, all links together.
  """

  flops: float
  memory: float
  memory_rate: float
  link_rate: float


def _tpu(kind, gib, memory_rate, link_rate) -> Peaks:
  return Peaks(metrics.peak_flops(kind), gib * GIB, memory_rate, link_rate)


PEAKS = {
  'v5e': _tpu('TPU v5e', 16, 819e9, 200e9),
  'v5p': _tpu('TPU v5', 95, 2765e9, 600e9),
  'v6e': _tpu('TPU v6e', 32, 1640e9, 400e9),
}


def peaks(topology: str, words: Sequence[str] = ()) -> Peaks | None:
  """Peaks of a topology's chips; None for devices that are not in the table.

  Args:
    topology: such as v5e:16x16.
    words: the four numbers of `Peaks`, in place of the table's.

  Raises:
    ValueError: for words that are not four numbers above 0.
  """
  if not words:
    return PEAKS.get(topology.partition(':')[0])
  try:
    given = Peaks(*map(float, words))
  except (TypeError, ValueError):
    given = (0.0,)
  if not all(0 < value < math.inf for value in given):
    raise ValueError(
      f'--peaks={",".join(words)}: four numbers above 0, FLOP/s, bytes of '
      'HBM, bytes/s of HBM, bytes/s sent to others'
    )
  return given


class Times(NamedTuple):
  """Seconds that each part of a chip is busy at its peak."""

  compute: float
  memory: float
  links: float

  @property
  def bound(self) -> str:
    """What is busy longest: compute, HBM or ICI."""
    names = ('compute', 'HBM', 'ICI')
    return names[max(range(3), key=lambda i: self[i])]


def times(peaks: Peaks, costs: Costs) -> Times:
  """Gives the seconds of one chip; a step takes at least the longest."""
  return Times(
    costs.flops / peaks.flops,
    costs.traffic / peaks.memory_rate,
    sum(costs.sent.values()) / peaks.link_rate,
  )
