"""Options of a life that cannot be are refused."""

import dataclasses

import nights_cases as cases
import pytest


@pytest.mark.parametrize(
  'values',
  [
    {'nights': -2},
    {'piece': 0},
    {'keep': -1},
    {'surprise': 0.0},
    {'disagreement': 0.0},
  ],
  ids=str,
)
def test_impossible_options_are_refused(values):
  with pytest.raises(ValueError, match=f'{next(iter(values))}='):
    dataclasses.replace(cases.OPTIONS, **values)
