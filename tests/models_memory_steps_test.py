"""Pieces of work taken step by step, in turn."""

from nestax.models.memory import steps


def piece(name, count, seen):
  for i in range(count):
    seen.append(f'{name}{i}')
    yield
  seen.append(f'{name} ends')
  return count


def test_steps_are_taken_in_turn_and_results_keep_their_places():
  seen = []
  pieces = [piece('a', 1, seen), piece('b', 3, seen), piece('c', 0, seen)]
  assert steps.in_turn(pieces) == [1, 3, 0]
  assert seen == ['a0', 'b0', 'c ends', 'a ends', 'b1', 'b2', 'b ends']


def test_one_piece_is_taken_to_its_end():
  assert steps.last(piece('a', 2, [])) == 2
