"""The benchmark of optimisers measures what it says."""

import math

import numpy as np
import pytest

from nestax.launch.benches import optim


def test_the_preset_is_24_blocks_of_1536():
  shapes = optim.parse(optim.PRESETS['679m'])
  numbers = sum(math.prod(shape) for shape in shapes)
  assert numbers == 24 * 12 * 1536**2 == 679_477_248


@pytest.mark.parametrize('word', ['', '8', '4x', '4x-1', '0x4', 'axb'])
def test_words_that_are_no_shape_are_refused(word):
  with pytest.raises(optim.ShapeError, match='24x1536x4096'):
    optim.parse([word])


@pytest.fixture(scope='module')
def rows():
  shapes = [(2, 16, 64), (64, 16)]
  table = optim.measure(shapes, repeats=1, every=4)
  return {row['name']: row for row in table}


def test_state_is_counted_in_copies_of_the_matrices(rows):
  copies = {name: row['state copies'] for name, row in rows.items()}
  assert copies.pop(optim.FLOOR) is None
  # a few bytes more, for the counts of steps
  want = {'adamw': 2, 'optax muon': 1, optim.PEER: 0.5, 'm3': 2.5}
  want['m3, bf16 slow'] = 2
  np.testing.assert_allclose(
    [copies[name] for name in want], list(want.values()), atol=0.02
  )


def test_a_step_is_between_the_cheapest_and_the_dearest(rows):
  for row in rows.values():
    assert 0 < row['cheapest'] <= row['ms'] <= row['dearest']
  assert rows[optim.PEER][f'/ {optim.PEER}'] == 1
  assert rows[optim.FLOOR][f'/ {optim.FLOOR}'] == 1


def test_noise_does_not_put_a_step_above_the_dearest(monkeypatch):
  # each position of a window is mostly cheap, but two windows of three dear
  times = np.array([[1.0, 9.0], [9.0, 1.0], [1.0, 1.0]])
  monkeypatch.setattr(
    optim.timing,
    'interleaved',
    lambda runs, repeats, window: dict.fromkeys(runs, times),
  )
  row = optim.measure([(4, 8)], repeats=3, every=2)[0]
  assert (row['cheapest'], row['ms'], row['dearest']) == (1e3, 5e3, 9e3)


def test_the_refresh_is_in_one_step_of_a_window():
  entry = optim.entries(4)['m3']
  shapes = [(8, 8)]
  run, _ = optim._prepare(shapes, entry.tx, optim._draw(shapes, 'float32'))
  directions = []
  for _ in range(8):
    _, state = run()
    directions.append(np.asarray(state[0].directions[0][0], np.float32))
  moved = [not np.array_equal(a, b) for a, b in zip(directions, directions[1:])]
  assert moved == [False, False, True, False, False, False, True]
