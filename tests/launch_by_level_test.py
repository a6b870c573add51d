"""Levels are called by their periods in what a life writes down."""

import json

from nestax.launch import by_level, report
from nestax.sleep import cycle
from nestax.sleep.gate import Decision

PERIODS = (4, 16)


def kept(recall=None):
  metrics = {
    'core_before': 2.0,
    'core_after': 1.5,
    'written_0': 1.25,
    'written_1': 0.5,
    'divergence_0_first': 0.25,
    'divergence_0': 0.125,
    'on_policy_divergence_1': 0.75,
    'lost_1': 0.375,
    'slots_0': 0,
    'slots_1': 3,
    'recall_asked': 12,
    'recall_alone_0': 0.875,
    'recall_without_1': 0.0,
  }
  night = cycle.Night(
    None, None, Decision(False, 'rolled back'), ('ann',), metrics, {'gate': 2.0}
  )
  return report.night_row(3, night, 'mon', {'mon': 1.0}, [0, 2], 6, recall)


def test_a_line_of_a_night_calls_levels_by_their_periods():
  row = by_level.row(kept(), PERIODS)
  assert row['levels'] == {
    'every 4': {
      'written': 1.25,
      'divergence_first': 0.25,
      'divergence': 0.125,
      'used_if_accepted': 0,
      'recall_alone': 0.875,
      'used': 0,
    },
    'every 16': {
      'written': 0.5,
      'on_policy_divergence': 0.75,
      'lost': 0.375,
      'used_if_accepted': 3,
      'recall_without': 0.0,
      'used': 2,
    },
  }
  assert row['metrics'] == {
    'core_before': 2.0, 'core_after': 1.5, 'recall_asked': 12
  }  # fmt: skip
  rest = {k: x for k, x in kept().items() if k not in ('used', 'metrics')}
  assert {k: row[k] for k in rest} == rest
  assert len(row) == len(rest) + 2 and json.dumps(row, allow_nan=False)


def test_what_is_known_by_level_is_so_told():
  recall = {'asked': {'mon': 12}, 'dusk': {'mon': 1.0}}
  recall |= {'alone': [{'mon': 0.5}, {'mon': 0.25}]}
  recall |= {'without': [None, {'mon': 0.0}]}
  row = by_level.row(kept(recall), PERIODS)
  assert row['recall'] == {
    'asked': {'mon': 12},
    'dusk': {'mon': 1.0},
    'alone': {'every 4': {'mon': 0.5}, 'every 16': {'mon': 0.25}},
    'without': {'every 4': None, 'every 16': {'mon': 0.0}},
  }
