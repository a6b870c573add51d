"""Two processes of four devices: one run, whoever dies, in bounded time.

One life, in three starts: a SIGTERM to one process stops both with a
checkpoint, a SIGKILL ends the other in words, and the last start goes on to
the end, on the curve of one process of eight devices.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import launch_cases as cases
import numpy as np
import pytest

from nestax.launch import checkpoint, metrics, run
from nestax.launch import mesh as meshes
from nestax.launch.data import pipeline

STEPS = 60
FAMILY = 'transformer'
HEARTBEAT = 10
CONFIG = """
import launch_cases

def get_config():
  config = launch_cases.make_config({corpus!r}, {family!r})
  config.model.N = 1
  config.mesh.update({{'data': 2, 'fsdp': 4}})
  config.data.shards = 2
  config.train.update({{'steps': {steps}, 'batch': 8, 'carry_state': True}})
  config.checkpoint.every = 5
  config.eval.every = 10
  config.log.sample_tokens = 5
  return config
"""


def start(folder, process):
  """One of two processes of the run in `folder / run`."""
  address = f'127.0.0.1:{(folder / "port").read_text()}'
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'nestax.launch.train'),
      *(f'--config={folder / "config.py"}', f'--workdir={folder / "run"}'),
      *(f'--coordinator={address}', '--processes=2', f'--process={process}'),
      f'--heartbeat={HEARTBEAT}',
    ],
    env=os.environ
    | {
      'JAX_NUM_CPU_DEVICES': '4',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
      'PYTHONPATH': os.pathsep.join(
        [str(pathlib.Path(__file__).parent), os.environ.get('PYTHONPATH', '')]
      ),
    },
    stdout=(folder / f'out{process}').open('w'),
    stderr=subprocess.STDOUT,
  )


def both(folder):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    (folder / 'port').write_text(str(free.getsockname()[1]))
  return [start(folder, process) for process in range(2)]


def until(folder, step, processes):
  """Waits until the run has written that step."""
  path = folder / 'run' / 'metrics.jsonl'
  while all(process.poll() is None for process in processes):
    if any(row['step'] >= step for row in metrics.read(path)):
      return
    time.sleep(0.01)


def ends(folder, processes):
  """Exit codes and what was said, of both."""
  codes = [process.wait(timeout=300) for process in processes]
  time.sleep(0.5)  # last words come after the end
  return codes, [(folder / f'out{i}').read_text() for i in range(2)]


@pytest.fixture(scope='module')
def life(tmp_path_factory):
  """What was seen of the three starts, and how long it took to end them."""
  folder = tmp_path_factory.mktemp('life')
  corpus = cases.write_corpus(folder / 'corpus')
  words = CONFIG.format(corpus=corpus, family=FAMILY, steps=STEPS)
  (folder / 'config.py').write_text(words)
  seen = {'folder': folder}
  rows = lambda: metrics.read(folder / 'run' / 'metrics.jsonl')  # noqa: E731

  processes = both(folder)
  until(folder, 12, processes)
  processes[1].send_signal(signal.SIGTERM)
  began = time.monotonic()
  seen['terminated'] = ends(folder, processes)
  seen['seconds to save'] = time.monotonic() - began
  seen['stopped at'] = rows()[-1]['step']

  processes = both(folder)
  until(folder, seen['stopped at'] + 12, processes)
  processes[1].kill()
  began = time.monotonic()
  seen['killed'] = ends(folder, processes)
  seen['seconds'] = time.monotonic() - began
  seen['killed rows'] = rows()
  seen['saved'] = max(ocp_steps(folder / 'run'))

  processes = both(folder)
  seen['ended'] = ends(folder, processes)
  seen['rows'] = rows()
  return seen


def ocp_steps(workdir):
  return checkpoint.ocp.utils.checkpoint_steps(workdir / 'checkpoints')


def config_of(life, **mesh):
  scope = {}
  exec((life['folder'] / 'config.py').read_text(), scope)
  config = scope['get_config']()
  config.mesh.update(mesh)
  return config


@pytest.fixture(scope='module')
def alone(life, tmp_path_factory):
  """The same run in this process of eight devices: its workdir and rows."""
  workdir = tmp_path_factory.mktemp('alone')
  run.train(run.prepare(config_of(life), workdir))
  return workdir, metrics.read(workdir / 'metrics.jsonl')


def curves(rows):
  return [np.array(cases.curve(rows, split)) for split in ('train', 'valid')]


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(life):
  codes, said = life['terminated']
  assert codes == [128 + signal.SIGTERM] * 2, said
  assert life['seconds to save'] < 30
  step = life['stopped at']
  assert 12 <= step < STEPS
  for words in said:
    assert f'SIGTERM: saved checkpoint {step}' in words.splitlines()[-1]


def test_a_process_that_is_killed_ends_the_others_in_words(life):
  codes, said = life['killed']
  assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), said
  for words in said:
    last = words.splitlines()[-1]
    assert last.startswith('nestax-train: '), words
    assert f'checkpoint {life["saved"]} in' in last, words
  assert life['seconds'] < HEARTBEAT + 30


def test_the_next_start_goes_on_exactly(life):
  codes, said = life['ended']
  assert codes == [0, 0], said
  assert f'resuming from checkpoint {life["saved"]}' in said[0]
  before = [row['step'] for row in life['killed rows']]
  assert max(before) > life['saved'], 'nothing was made twice'
  for again, first in zip(curves(life['rows']), curves(life['killed rows'])):
    np.testing.assert_array_equal(again[: len(first)], first)
  assert [int(n) for n, _ in curves(life['rows'])[0]] == list(
    range(1, STEPS + 1)
  )


def test_only_the_first_process_speaks_and_no_sample_is_written(life):
  said = life['ended'][1]
  assert f'step {STEPS}/{STEPS}' in said[0]
  assert 'no sample.txt from several processes' in said[0]
  assert 'step' not in said[1]


def test_two_processes_of_four_devices_are_one_of_eight(life, alone):
  workdir, rows = alone
  for two, one in zip(curves(life['rows']), curves(rows)):
    np.testing.assert_allclose(two, one, 1e-5)
  two, one = (
    params_of(at, config_of(life)) for at in (life['folder'] / 'run', workdir)
  )
  assert two.keys() == one.keys() and len(one) > 10
  for name in one:
    np.testing.assert_allclose(two[name], one[name], 1e-4, 1e-5, err_msg=name)


def params_of(workdir, config):
  state, _ = state_of(workdir, config)
  leaves, _ = run.jax.tree_util.tree_flatten_with_path(state.params)
  return {run.jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def state_of(workdir, config):
  """The newest state, and the place in the data, on the config's mesh."""
  plan = run.prepare(config, workdir)
  memory = lambda: plan.memory(config.train.batch)  # noqa: E731
  abstract = run.steps.abstract_state(plan.model, plan.tx, plan.mesh, memory)
  checkpoints = checkpoint.Checkpoints(workdir, config, lambda line: None)
  part = meshes.part(plan.mesh, config.train.batch)
  data = pipeline.train_iterator(config, part.rows)
  state = checkpoints.restore(abstract, data)
  checkpoints.close()
  return state, data


def test_one_process_goes_on_with_what_two_have_saved(life, alone, tmp_path):
  """On 2 devices of this process, then on 8, from a checkpoint of 2 x 4."""
  shutil.copytree(life['folder'] / 'run', tmp_path / 'run')
  kept = sorted(ocp_steps(tmp_path / 'run'))
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(kept[-1]))
  rows = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  assert kept[-2] == STEPS - 5
  for steps, sizes in (
    (STEPS - 2, {'data': 2, 'fsdp': 1, 'tensor': 1}),
    (STEPS, {}),
  ):
    config = config_of(life, **sizes)
    config.train.steps = steps
    run.train(run.prepare(config, tmp_path / 'run'))
  rows = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  got, want = curves(rows)[0], curves(alone[1])[0]
  np.testing.assert_allclose(got, want, 1e-5)
