"""When which pair is due, and which nights cannot be."""

import pytest

from nestax.sleep.tools import CycleConfig


def test_pairs_are_due_at_their_own_nights():
  how = CycleConfig(every=2)
  assert [how.due(n, 3) for n in (1, 2, 3, 4)] == [
    (0,), (1, 0), (0,), (2, 1, 0)
  ]  # fmt: skip


@pytest.mark.parametrize(
  'values', [{'every': 0}, {'full': 'grow'}, {'lost': 1.1}], ids=str
)
def test_impossible_nights_are_refused(values):
  with pytest.raises(ValueError, match=f'{next(iter(values))}='):
    CycleConfig(**values)
