"""Flags of a job, and what is said when a process cannot say it itself."""

import signal
import subprocess
import sys

import pytest

from nestax.launch import distributed
from nestax.launch.distributed import Job

REFUSED = {
  '--processes and --process missing': Job('a:1'),
  '--coordinator missing': Job(None, 2, 0),
  'has to be HOST:PORT': Job('a', 2, 0),
  '--coordinator=a:99999': Job('a:99999', 2, 0),
  '--process=2 of --processes=2': Job('a:1', 2, 2),
  '--process=-1 of': Job('a:1', 2, -1),
  'give it alone': Job(None, 2, None, detect=True),
  '--heartbeat=4': Job(heartbeat=4),
}


@pytest.mark.parametrize('words', REFUSED)
def test_flags_that_do_not_go_together_are_refused(words):
  with pytest.raises(ValueError, match=words):
    distributed.join(REFUSED[words])


def test_a_run_of_one_process_asks_nobody(tmp_path):
  distributed.join(Job())
  distributed.check_shared(tmp_path / 'not there')
  assert distributed.told('words') == 'words'
  with pytest.raises(KeyError), distributed.together():
    raise KeyError('words')
  with pytest.raises(ZeroDivisionError), distributed.others_needed():
    _ = 1 / 0
  distributed.leave(3)


WITNESSED = """
import os, signal, sys
from nestax.launch import last_words
with last_words.witnessed('name', sys.argv[1], wanted=sys.argv[2] != 'alone'):
  if sys.argv[2] == 'SIGTERM':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    os.killpg(os.getpid(), signal.SIGTERM)
  if sys.argv[2] == 'error':
    raise SystemExit('in words')
  if sys.argv[2] in ('SIGKILL', 'SIGABRT', 'alone'):
    os.kill(os.getpid(), signal.SIGKILL if sys.argv[2] != 'SIGABRT' else 6)
"""


def test_whoever_dies_without_a_word_has_it_said(tmp_path):
  """All at once, each in its own group, as a launcher would signal it."""
  for step in ('3', '12', '13.orbax-checkpoint-tmp-1'):
    (tmp_path / 'checkpoints' / step).mkdir(parents=True)
  ways = ('SIGKILL', 'SIGABRT', 'SIGTERM', 'error', 'well', 'alone')
  running = {
    way: subprocess.Popen(
      [sys.executable, '-c', WITNESSED, tmp_path, way],
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    for way in ways
  }
  said = {way: process.communicate()[1] for way, process in running.items()}
  codes = {way: process.returncode for way, process in running.items()}
  assert codes == {
    'SIGKILL': -signal.SIGKILL,
    'SIGABRT': -signal.SIGABRT,
    'SIGTERM': 7,
    'error': 1,
    'well': 0,
    'alone': -signal.SIGKILL,
  }
  for way in ('SIGKILL', 'SIGABRT'):
    assert said[way].startswith('name: this process was ended from outside')
    assert 'checkpoint 12 in' in said[way]
  assert said['error'] == 'in words\n'
  assert not said['SIGTERM'] and not said['well'] and not said['alone']
