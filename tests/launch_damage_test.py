"""Damaged checkpoints: named, set aside, and the one before them read."""

import gc
import logging
import os
import shutil
import warnings

import checkpoint_cases as cases
import numpy as np
import pytest

from nestax.launch import checkpoint, damage


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


def async_serialize_from_host():
  """As Orbax's, whose write has not begun when another one fails."""

  async def write_fragment(): ...

  return write_fragment()


def collected(say):
  """What is said when such a write is collected."""
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    say()
    async_serialize_from_host()
    gc.collect()
  return [str(one.message) for one in said]


def test_writes_that_never_began_are_not_told():
  assert 'never awaited' in collected(lambda: None)[0]
  assert not collected(damage.silence_stack_traces)


def test_tasks_that_were_pending_are_not_told(caplog):
  damage.silence_stack_traces()
  logger = logging.getLogger('asyncio')
  logger.error('Task was destroyed but it is pending!')
  logger.error('something else')
  assert caplog.messages == ['something else']


def test_writes_that_never_began_fail_no_test_that_comes_after():
  async_serialize_from_host()
  gc.collect()
