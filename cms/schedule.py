"""Which level commits when: periods in tokens, fastest level first."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Level:
  """One level of the continuum: a residual MLP that commits every `period`.

  Attributes:
    period: tokens between two commits (the paper's chunk size C^(l), NL
      section 7.1); 0 for a level that never commits, an ordinary MLP.
    F: hidden width of its MLP.
  """

  period: int
  F: int


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The levels of a block, fastest to slowest.

  Raises:
    ValueError: for a negative period or width, or for a period that is not a
      multiple of the one before it.
  """

  levels: tuple[Level, ...]

  def __post_init__(self):
    for level in self.levels:
      if level.period < 0 or level.F < 1:
        raise ValueError(
          f'a level of period {level.period} and hidden width {level.F}: the '
          'period must be 0 (never) or more, the width at least 1'
        )
    periods = [level.period for level in self.levels if level.period]
    for fast, slow in zip(periods, periods[1:]):
      if slow % fast or slow == fast:
        raise ValueError(
          f'level periods {periods}: {slow} is not a larger multiple of '
          f'{fast}; give them fastest first, each a multiple of the one before'
        )


def split_width(F: int, periods: tuple[int, ...], multiple: int) -> Schedule:
  """Levels that together have the hidden width F of one MLP.

  Args:
    F: hidden width to divide.
    periods: one level each, fastest first.
    multiple: widths are multiples of it where F allows; the slowest level
      takes what is left.

  Raises:
    ValueError: without periods, for a multiple below 1, or if F cannot give
      every level one `multiple`.
  """
  n = len(periods)
  if n < 1 or multiple < 1:
    raise ValueError(
      f'periods={periods}, multiple={multiple}: at least one level, and a '
      'multiple of at least 1'
    )
  each = F // n // multiple * multiple
  if each < 1:
    raise ValueError(
      f'hidden width F={F} cannot be divided among {n} levels in multiples of '
      f'{multiple}: F must be at least {n * multiple}'
    )
  widths = [each] * (n - 1) + [F - each * (n - 1)]
  return Schedule(tuple(Level(p, w) for p, w in zip(periods, widths)))
