"""What is slept on; that garbage is not, nights show."""

import nights_cases as cases
import numpy as np

from nestax.launch import days, filters, plans
from nestax.sleep.replay import Piece


def test_a_programs_own_predicates_are_filters_of_its_nights(tmp_path):
  folder, made = cases.write_texts(tmp_path), cases.made()
  read = days.load([str(folder / 'ann.txt')], 1, made.tokenizer)
  core = str(folder / 'core.txt')
  keep = [lambda piece: piece.mark != 'day 3', lambda piece: True]
  plan = plans.prepare(made, read, core, cases.OPTIONS, keep=keep)
  assert filters.of_plan(plan, None, None, [], []) == keep


def test_pieces_cost_what_their_owners_slow_levels_say(monkeypatch, tmp_path):
  plan = cases.plan(cases.write_texts(tmp_path))  # rows of ten tokens
  asked = []

  def row_nats(reader, params, context, tokens, length):
    asked.append(params)
    assert context is None
    return 1.0 * (tokens[:, 0] * (length - 1)), length - 1

  monkeypatch.setattr(filters.gate, 'row_nats', row_nats)
  monkeypatch.setattr(filters.owners, 'personal', lambda p, s, row: row)
  pieces = [
    Piece('bob', (7,) * 4),
    Piece('ann', (2,) * 11 + (5,) * 9),
    Piece('bob', (3,)),
    Piece('ann', (4,) * 10 + (1,) * 4),
  ]
  costs = filters.disagreement(plan, None, None, ['ann', 'cid', 'bob'], pieces)
  np.testing.assert_allclose(costs, [7, 2, 0, (9 * 4 + 3) / 12])
  assert asked == [0, 2]
