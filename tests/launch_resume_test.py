"""kill -9 at a random moment, the same command: the same curve to the bit."""

import os
import random
import signal
import subprocess
import sys
import time

import launch_cases as cases
import pytest

from nestax.launch import metrics

STEPS = 24


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  """Starts a Hope that carries its memories; compiled once for all."""
  folder = tmp_path_factory.mktemp('command')
  corpus = cases.write_corpus(folder / 'corpus')
  config = folder / 'small.py'
  config.write_text(
    'import launch_cases\n\n\n'
    'def get_config():\n'
    f'  config = launch_cases.make_config({corpus!r}, "hope")\n'
    '  config.train.carry_state = True\n'
    f'  config.train.steps = {STEPS}\n'
    '  config.checkpoint.every = 3\n'
    '  config.eval.every = 7\n'
    '  return config\n'
  )
  environment = {
    'PYTHONPATH': cases.path(),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
  }

  def start(workdir):
    return subprocess.Popen(
      [
        *(sys.executable, '-m', 'nestax.launch.train'),
        *(f'--config={config}', f'--workdir={workdir}'),
      ],
      env=os.environ | cases.QUICK | environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return start


@pytest.fixture(scope='module')
def whole(command, tmp_path_factory):
  """The rows of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('whole')
  process = command(workdir)
  out, _ = process.communicate(timeout=500)
  assert process.returncode == 0, out
  return metrics.read(workdir / 'metrics.jsonl')


def count(path):
  return len(path.read_text().splitlines()) if path.exists() else 0


def kill(process, workdir, number, rows):
  """Sends the signal once so many rows are written and a moment has gone."""
  while count(workdir / 'metrics.jsonl') < rows and process.poll() is None:
    time.sleep(0.002)
  time.sleep(random.uniform(0, 0.1))
  process.send_signal(number)
  return process.communicate(timeout=500)[0]


def test_a_killed_run_goes_on_to_the_same_curve(command, whole, tmp_path):
  process = command(tmp_path)
  at = random.randrange(1, STEPS // 2)
  kill(process, tmp_path, signal.SIGKILL, at)
  assert process.returncode == -signal.SIGKILL, f'killed too late, at {at}'
  process = command(tmp_path)
  out, _ = process.communicate(timeout=500)
  assert process.returncode == 0, out
  rows = metrics.read(tmp_path / 'metrics.jsonl')
  for split in ('train', 'valid'):
    assert cases.curve(rows, split) == cases.curve(whole, split), (at, out)


def test_a_terminated_run_says_where_it_saved(command, whole, tmp_path):
  process = command(tmp_path)
  out = kill(process, tmp_path, signal.SIGTERM, STEPS // 3)
  assert process.returncode == 128 + signal.SIGTERM, out
  last = out.splitlines()[-1]
  step = metrics.read(tmp_path / 'metrics.jsonl')[-1]['step']
  assert f'SIGTERM: saved checkpoint {step} in {tmp_path}' in last
  assert (tmp_path / 'checkpoints' / str(step)).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, least', [('quickstart', 6e6), ('hope_30m', 3e8)]
)
def test_a_state_of_its_size_is_saved_within_30_seconds(name, least, tmp_path):
  """From SIGTERM to the end of the process, two steps under way aside."""
  # steps that are short on a CPU, beside states that are not
  words = ['--config.train.batch=1', '--config.data.length=16',
           '--config.optimizer=adamw', '--config.eval.every=0',
           '--config.log.every=1']  # fmt: skip
  with (tmp_path / 'out').open('w') as out:
    process = subprocess.Popen(
      [
        *(sys.executable, '-m', 'nestax.launch.train'),
        *(f'--config={name}', f'--workdir={tmp_path / "run"}', *words),
      ],
      env=os.environ | cases.QUICK,
      stdout=out,
      stderr=subprocess.STDOUT,
    )
    while count(tmp_path / 'run' / 'metrics.jsonl') < 3:
      assert process.poll() is None, (tmp_path / 'out').read_text()
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code = process.wait(timeout=300)
    seconds = time.monotonic() - began
  said = (tmp_path / 'out').read_text()
  assert code == 128 + signal.SIGTERM, said
  assert 'SIGTERM: saved checkpoint' in said.splitlines()[-1]
  (saved,) = (tmp_path / 'run' / 'checkpoints').iterdir()
  files = [path for path in saved.rglob('*') if path.is_file()]
  size = sum(path.stat().st_size for path in files)
  rows = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  step = 16 / rows[-1]['tokens_per_second']
  print(f'{name}: {size / 1e6:.0f} MB, {seconds:.1f} s, a step {step:.1f} s')
  assert size > least and seconds < 30 + 2 * step
