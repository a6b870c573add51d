"""The buffer is bounded, its owners are apart, and it comes back from disk."""

import json
import random

import jax.numpy as jnp
import numpy as np
import pytest

from nestax.sleep import replay
from nestax.sleep.replay import Piece, Replay, ReplayError


def filled(capacity=10):
  buffer = Replay(capacity)
  for i in range(6):
    owner = 'ab'[i % 2]
    buffer.add(Piece(owner, tuple(range(i, i + 3)), float(i), f'day {i}'))
  return buffer


def test_every_owner_has_its_own_bound_and_loses_the_oldest():
  buffer = Replay(7)
  for i in range(50):
    buffer.add(Piece('a', (i, i, i)))
    assert buffer.held('a') <= 7
  buffer.add(Piece('b', (1,)))
  assert [p.tokens[0] for p in buffer.pieces(['a'])] == [48, 49]
  assert buffer.owners == ['a', 'b']


def test_a_piece_longer_than_the_bound_keeps_its_end():
  buffer = Replay(4)
  buffer.add(Piece('a', tuple(range(9))))
  assert buffer.pieces()[0].tokens == (5, 6, 7, 8)


def test_a_piece_goes_on_with_its_mean_surprise():
  buffer = Replay(6)
  buffer.extend(Piece('a', (1,), 4.0, 'day 1'))
  buffer.extend(Piece('a', (2, 3), 1.0, 'day 1'))
  buffer.extend(Piece('b', (9,), 7.0, 'day 1'))
  assert buffer.pieces(['a']) == [Piece('a', (1, 2, 3), 2.0, 'day 1')]
  buffer.extend(Piece('a', (4,), 5.0, 'day 2'))
  assert [p.mark for p in buffer.pieces(['a'])] == ['day 1', 'day 2']
  buffer.extend(Piece('a', (5, 6, 7), 5.0, 'day 2'))
  assert [p.tokens for p in buffer.pieces(['a'])] == [(4, 5, 6, 7)]


def test_an_owner_who_goes_leaves_nothing(tmp_path):
  buffer = filled()
  others = buffer.pieces(['b'])
  buffer.delete('a')
  buffer.delete('never there')
  assert buffer.pieces() == others
  buffer.save(tmp_path / 'replay.jsonl')
  assert '"a"' not in (tmp_path / 'replay.jsonl').read_text()
  with pytest.raises(ReplayError, match="nothing of owner 'a'"):
    buffer.pieces(['a'])


def test_comes_back_from_disk(tmp_path):
  buffer = filled()
  buffer.add(Piece('c', (1, 2)))  # nobody has measured its surprise
  path = tmp_path / 'replay.jsonl'
  buffer.save(path)
  back = Replay.load(path)
  assert back.capacity == buffer.capacity
  assert list(map(repr, back.pieces())) == list(map(repr, buffer.pieces()))
  assert [p.name for p in tmp_path.iterdir()] == ['replay.jsonl']
  json.loads(path.read_text().splitlines()[-1])


@pytest.mark.parametrize('text', ['', 'x', '{"capacity": 3}\n{"owner": "a"}'])
def test_a_file_that_is_no_buffer_is_refused(tmp_path, text):
  (tmp_path / 'f').write_text(text)
  with pytest.raises(ReplayError, match='line [12]: not a line'):
    Replay.load(tmp_path / 'f')


def test_rows_hold_every_token_once():
  pieces = [Piece('a', tuple(range(7))), Piece('a', (9,))]
  tokens, count, origin = replay.batch(pieces, 3, pad=-1)
  np.testing.assert_array_equal(count, [3, 3, 1, 1])
  np.testing.assert_array_equal(origin, [0, 0, 0, 1])
  assert tokens[tokens >= 0].tolist() == [*range(7), 9]
  with pytest.raises(ReplayError, match='all was filtered out'):
    replay.batch([], 3, pad=0)


def test_garbage_is_filtered_by_surprise_and_by_disagreement():
  rng = random.Random(0)
  text = [Piece('a', tuple([1, 2, 3, 4] * 8), 1.0) for _ in range(5)]
  noise = [
    Piece('a', tuple(rng.randrange(256) for _ in range(32)), 5.5)
    for _ in range(5)
  ]
  pieces = [p for pair in zip(text, noise) for p in pair]
  kept = list(replay.consolidated(pieces, replay.surprising(most=3.0)))
  assert kept == text

  def score(pieces):  # how many words the slow levels have never seen
    return [np.mean([t > 4 for t in p.tokens]) for p in pieces]

  kept = replay.consolidated(pieces, replay.agreeing(score, pieces, 0.5))
  assert list(kept) == text


def test_the_users_own_predicate_is_asked_too():
  pieces = filled().pieces()
  kept = replay.consolidated(
    pieces, replay.surprising(9.0), lambda p: p.mark != 'day 3'
  )
  assert [p.mark for p in kept] == ['day 0', 'day 2', 'day 4', 'day 1', 'day 5']


def test_what_cannot_be_judged_is_refused():
  piece = Piece('a', (1,))
  assert not replay.surprising(100.0)(piece)
  assert not replay.agreeing(lambda p: [float('nan')], [piece], 1.0)(piece)
  with pytest.raises(ReplayError, match='2 scores of 1 pieces'):
    replay.agreeing(lambda p: [0.0, 0.0], [piece], 1.0)


def test_no_room_is_refused():
  with pytest.raises(ReplayError, match='capacity of 0'):
    Replay(0)


@pytest.mark.parametrize('kind', [list, np.array, jnp.array])
def test_tokens_of_a_piece_may_be_a_list_or_an_array(kind):
  buffer = Replay(4)
  buffer.add(Piece('a', kind([1, 2, 3]), 1.0))
  buffer.extend(Piece('a', kind([4, 5]), 1.0))
  assert buffer.pieces() == [Piece('a', (2, 3, 4, 5), 1.0)]
  assert Piece('a', kind([1, 2, 3])).tokens == (1, 2, 3)


@pytest.mark.parametrize(
  'tokens', ['text', 5, [[1, 2]], [0.5], np.ones((2, 3))]
)
def test_tokens_of_a_piece_are_a_row_of_whole_numbers(tokens):
  with pytest.raises(ReplayError, match='a row of whole numbers'):
    Piece('a', tokens)
