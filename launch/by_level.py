"""What is written down of a night, told by level as its table is.

A life keeps numbers of levels by the level's place, from 0: `written_0`, or a
list of all levels. Who reads its files knows levels by their periods.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_OF_LEVEL = re.compile(r'(.+)_(\d+)(_first)?')
# `used` is of the model that woke up, this of the one that was proposed
_NAMES = {'slots': 'used_if_accepted'}


def row(kept: Mapping[str, Any], periods: Sequence[int]) -> dict[str, Any]:
  """A line of `night.jsonl`, from what `report.night_row` made."""
  metrics = split(kept['metrics'], periods)
  levels = metrics.pop('levels')
  for level, used in zip(levels.values(), kept['used'], strict=True):
    level['used'] = used
  made = {('levels' if k == 'used' else k): x for k, x in kept.items()}
  made |= {'levels': levels, 'metrics': metrics}
  if 'recall' in kept:
    made['recall'] = {
      name: dict(zip(levels, x, strict=True)) if isinstance(x, list) else x
      for name, x in kept['recall'].items()
    }
  return made


def split(metrics: Mapping[str, Any], periods: Sequence[int]) -> dict[str, Any]:
  """The numbers of a night, with those of each level under `levels`."""
  rest: dict[str, Any] = {}
  levels: dict[str, dict] = {f'every {period}': {} for period in periods}
  for name, value in metrics.items():
    found = _OF_LEVEL.fullmatch(name)
    if not found:
      rest[name] = value
      continue
    what, k, first = found.groups('')
    levels[f'every {periods[int(k)]}'][_NAMES.get(what, what) + first] = value
  return rest | {'levels': levels}
