"""Damaged checkpoints: named, set aside, and the one before them read."""

import os
import shutil

import checkpoint_cases as cases
import numpy as np
import pytest

from nestax.launch import checkpoint


@pytest.fixture
def said():
  return []


@pytest.fixture
def run(tmp_path, said):
  return cases.write(tmp_path, said)


def flip(folder):
  path = cases.largest(folder)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


DAMAGES = {
  'array data cut in half': cases.truncate,
  'one bit flipped': flip,
  'array data deleted': lambda folder: cases.largest(folder).unlink(),
  'no state': lambda folder: shutil.rmtree(folder / 'state'),
  'no data position': lambda folder: shutil.rmtree(folder / 'data'),
  'empty about': lambda folder: os.truncate(folder / 'about' / 'metadata', 0),
}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_falls_back_and_says_so(run, said, damage):
  workdir, following = run
  damage(workdir / 'checkpoints' / '3')
  state, data = cases.restore(workdir, said)
  cases.assert_same(state, cases.make_state(2))
  np.testing.assert_array_equal(next(data), following[2])
  assert 'checkpoint 3' in said[0] and 'falling back' in said[0]
  assert 'resuming from checkpoint 2' in said[1]
  assert (workdir / 'damaged' / '3-0').is_dir()
  again = cases.open_again(workdir, [])
  again.save(3, cases.make_state(3), data)
  again.close()
  cases.assert_same(cases.restore(workdir, [])[0], cases.make_state(3))


def test_an_interrupted_save_is_named_and_left_out(run, said):
  workdir, _ = run
  shutil.copytree(
    workdir / 'checkpoints' / '3',
    workdir / 'checkpoints' / '4.orbax-checkpoint-tmp',
  )
  state, _ = cases.restore(workdir, said)
  cases.assert_same(state, cases.make_state(3))
  assert 'checkpoint 4 was interrupted' in said[0]


def test_all_damaged_is_an_error_and_nothing_is_deleted(run, said):
  workdir, _ = run
  for step in '123':
    cases.truncate(workdir / 'checkpoints' / step)
  with pytest.raises(
    checkpoint.CheckpointError, match=r'none of .*\[1, 2, 3\]'
  ):
    cases.restore(workdir, said)
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['1', '2', '3']
