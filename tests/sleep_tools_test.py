"""When which pair is due, and which nights cannot be."""

import dataclasses

import pytest
import sleep_cases as cases

from nestax.sleep import tools
from nestax.sleep.texts import Words
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


@pytest.mark.parametrize('assign, kinds', [('chain', 1), ('groups', 2)])
def test_receivers_in_the_same_blocks_share_their_programs(assign, kinds):
  cfg = cases.config(blocks='all', slots=2, rank=3, width='full')
  cms = dataclasses.replace(cfg.cms, periods=(4, 8, 16), assign=assign)
  cfg = dataclasses.replace(cfg, N=3, cms=cms)
  made = tools.of_model(cfg, CycleConfig(), Words(0, -1, 0))
  for programs in (made.seeds, made.dreams):
    assert sorted(programs) == [1, 2]
    assert len({id(x) for x in programs.values()}) == kinds


def test_all_pairs_are_paid_for_meaning_as_the_user_says(monkeypatch):
  cfg, own = cases.config(blocks='all', slots=2, rank=3), lambda *x: x
  hearing, asked = tools.seed.hearing, []
  monkeypatch.setattr(
    tools.seed, 'hearing', lambda *how: asked.append(how[2]) or hearing(*how)
  )
  tools.of_model(cfg, CycleConfig(), Words(0, -1, 0), own)
  assert asked == [own]
