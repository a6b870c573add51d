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


def test_pieces_beside_each_other_are_steps_of_one():
  seen = []
  both = steps.beside(piece('a', 1, seen), piece('b', 2, seen))
  assert steps.in_turn([both, piece('c', 1, seen)]) == [[1, 2], 1]
  taken = ['a0', 'b0', 'c0', 'a ends', 'b1', 'c ends', 'b ends']
  assert seen == taken


def test_pieces_one_by_one_are_each_taken_to_its_end():
  seen = []
  after = steps.one_by_one(piece('a', 1, seen), piece('b', 1, seen))
  assert steps.last(after) == [1, 1]
  assert seen == ['a0', 'a ends', 'b0', 'b ends']


def test_one_piece_is_taken_to_its_end():
  assert steps.last(piece('a', 2, [])) == 2
