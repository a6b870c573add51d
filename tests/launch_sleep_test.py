"""The command: kill -9 in a night, wrong words, files it leaves."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import launch_cases
import ml_collections
import nights_cases as cases
import numpy as np
import pytest

from nestax.launch import checkpoint, command, life, trained
from nestax.launch import sleep as program
from nestax.models import model_state
from nestax.sleep.lineage import Lineage
from nestax.sleep.replay import Piece, Replay


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('command')
  cases.write_texts(folder)
  cases.write_run(folder / 'run')
  return folder


def start(folder, out):
  environment = {
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
  }
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'nestax.launch.sleep'),
      *(f'--workdir={folder / "run"}', f'--out={out}', '--days=1'),
      f'--text={folder / "ann.txt"},{folder / "bob.txt"}',
      *(f'--core={folder / "core.txt"}', f'--set={cases.SET}'),
    ],
    env=os.environ | launch_cases.QUICK | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for(path, process):
  while not path.exists() and process.poll() is None:
    time.sleep(0.002)
  assert path.exists(), process.communicate()[0]


def test_a_night_that_is_killed_was_never_slept(folder, tmp_path):
  """And is slept by the same command, as if nothing had been.

  That it comes to the same bits is seen in launch_nights_test.py, where a life
  goes on from the same checkpoint without a process of its own.
  """
  out, process = tmp_path, start(folder, tmp_path)
  # checkpoints: 1 never slept, 2 dusk, 3 after the night
  wait_for(out / 'checkpoints' / '2', process)
  time.sleep(random.uniform(0, 0.5))
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=500)
  assert process.returncode == -signal.SIGKILL
  assert len(Lineage(out / 'lineage.jsonl').versions()) == 1
  original = trained.load(folder / 'run').params
  assert cases.same(trained.load(out).params, original)
  process = start(folder, out)
  said, _ = process.communicate(timeout=500)
  assert process.returncode == 0, said
  assert 'resuming from checkpoint 2' in said
  assert 'night 1, after day 1' in said
  assert [row['night'] for row in cases.rows(out)] == [0, 1]
  assert not cases.same(trained.load(out).params, original)


def run(folder, *words):
  """Runs the command here, with flags of its own; its exit code."""
  try:
    return asked(
      f'--workdir={folder / "run"}',
      f'--text={folder / "ann.txt"}',
      f'--core={folder / "core.txt"}',
      f'--out={folder / "never"}',
      *words,
    )
  except SystemExit as exit:
    return exit.code


def asked(*words):
  """Runs the command with these flags alone; its exit code."""
  for name in program.FLAGS:  # of an earlier call
    program.FLAGS[name].unparse()
  parse = command.parser('nestax-sleep', '', program.FLAGS)
  return program.main(parse(['nestax-sleep', *words]))


def test_an_owner_is_deleted_by_name_and_folder_alone(tmp_path, capsys):
  made, out = cases.made(), tmp_path / 'life'
  cfg = made.model.cfg
  old = model_state.init_state(cfg, 2, cases.OPTIONS.window)
  old = jax.tree.map(np.ones_like, old)
  past = life.Past(['ann', 'bob'], Replay(9), done={'ann': 3})
  past.replay.add(Piece('ann', (1, 2)))
  store = life.Store(out, made, cases.OPTIONS, print)
  logits = np.ones((2, cfg.V), np.float32)
  store.save(life.Being(made.params, old, logits), past)
  store.close()
  assert asked('--forget=ann', f'--out={out}') == 0
  assert "ann's state and replay buffer are deleted" in capsys.readouterr().out
  assert [path.name for path in (out / 'checkpoints').iterdir()] == ['2']
  store, new = life.Store(out, made, cases.OPTIONS, print), life.Past([], None)
  being = store.restore(life.Being(made.params, old, logits), new)
  store.close()
  assert (new.present, new.replay.owners, new.done) == (['bob'], [], {})
  assert cases.same(being.params, made.params)
  assert being.logits_BxV.any(-1).tolist() == [False, True]
  assert being.state.levels.clock_B.tolist() == [0, 1]
  assert asked('--forget=ann', f'--out={out}') == 2
  error = capsys.readouterr().err
  assert '--forget=ann: there is no such owner' in error
  assert error.endswith('there are bob\n')


def test_where_there_is_no_life_nobody_is_deleted(tmp_path, capsys):
  words = "no life of nestax-sleep to delete 'ann' of is there; give the --out"
  assert asked('--forget=ann', f'--out={tmp_path / "no"}') == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / 'no').exists()
  config = ml_collections.ConfigDict({'checkpoint': {'keep': 1}})
  run = checkpoint.Checkpoints(tmp_path, config, print)
  past = life.Past(['ann'], Replay(2))
  run.save(1, life.Being({'w': np.zeros(2)}, {}, np.zeros(2)), past)
  run.close()
  assert asked('--forget=ann', f'--out={tmp_path}') == 2
  assert words in capsys.readouterr().err


def test_texts_that_are_missing_are_asked_for(capsys):
  assert asked('--workdir=run', '--core=core.txt') == 2
  assert '--text is missing: give files or folders' in capsys.readouterr().err
  assert asked('--workdir=run', '--text=day.txt') == 2
  assert '--core is missing: give a file' in capsys.readouterr().err


@pytest.mark.parametrize(
  'words, said',
  [
    (['--forge=ann'], 'Unknown command line flag'),
    (['--set=piece=0'], 'piece=0: at least 1'),
    (['--set=night.sed.steps=3'], "no key 'sed'"),
    (['--text=nowhere.txt'], '--text=nowhere.txt: there is no such file'),
    (['--core=nowhere.txt'], '--core=nowhere.txt: there is no such file'),
    (['--rehearse=nowhere*'], '--rehearse=nowhere*: there is no such file'),
    (
      ['--questions=nowhere.jsonl'],
      '--questions=nowhere.jsonl: there is no such file',
    ),
    (['--questions=/dev/null'], '--questions=/dev/null: no question in it'),
    (['--slots=4'], 'has 8 expert slots a level already'),
    (['--scope=owner'], '--scope=owner is for slots that --slots=N gives'),
    (['--scope=mine'], '--scope=mine: one of shared, owner'),
    (['--days=-1'], '--days=-1: 0 for a file a day, or more'),
    ([f'--set={cases.SET},earlier=4,held=9'], 'held=9 tokens of earlier days'),
    (['--rehearse=/dev/null'], '/dev/null: 0 tokens, shorter than a row of'),
    (['--owners=cid'], "no owner 'cid' reads; there are reader"),
    (['--set=arc=nowhere*.json'], 'arc=nowhere*.json: there is no such file'),
    (['--model=also.gguf'], 'one of them'),
    (['--rate=0.2'], '--rate is for the levels that a pretrained --model'),
    (['more'], "unexpected argument 'more'"),
  ],
  ids=lambda x: x[0] if isinstance(x, list) else '',
)
def test_what_cannot_be_is_refused_in_words(folder, words, said, capsys):
  assert run(folder, *words) == 2
  error = capsys.readouterr().err
  assert error.startswith('nestax-sleep: ') and said in error
  assert not (folder / 'never').exists()


def test_a_folder_that_cannot_be_written_is_named_with_its_flag(folder, capsys):
  out = folder / 'core.txt' / 'life'
  assert run(folder, f'--out={out}') == 2
  words = f'cannot write in the out {out}: Not a directory; give another one'
  assert f'{words} with --out' in capsys.readouterr().err
