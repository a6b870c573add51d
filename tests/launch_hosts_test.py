"""Two processes of four devices: one run, whoever dies, in bounded time.

One life, in two starts: a SIGKILL to one process ends the other in words, and
the next start goes on to the end, on the curve of one process of eight devices.
"""

import os
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

# Four processes that compile and wait for each other: a minute and a half.
pytestmark = pytest.mark.slow
STEPS = 40
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


def start(folder, workdir, process):
  """One of the two processes of a run."""
  address = f'127.0.0.1:{(folder / "port").read_text()}'
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'nestax.launch.train'),
      *(f'--config={folder / "config.py"}', f'--workdir={workdir}'),
      *(f'--coordinator={address}', '--processes=2', f'--process={process}'),
      f'--heartbeat={HEARTBEAT}',
    ],
    env=os.environ
    | cases.QUICK
    | {
      'JAX_NUM_CPU_DEVICES': '4',
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
      'PYTHONPATH': cases.path(),
    },
    stdout=(folder / f'out{process}').open('w'),
    stderr=subprocess.STDOUT,
  )


def both(folder, workdir):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    (folder / 'port').write_text(str(free.getsockname()[1]))
  return [start(folder, workdir, process) for process in range(2)]


def until(workdir, step, processes):
  """Waits until the run has written that step."""
  path = workdir / 'metrics.jsonl'
  while all(process.poll() is None for process in processes):
    if any(row['step'] >= step for row in metrics.read(path)):
      return
    time.sleep(0.01)


def ends(folder, processes):
  """Exit codes and what was said, of both."""
  codes = [process.wait(timeout=300) for process in processes]
  time.sleep(0.5)  # last words come after the end
  return codes, [(folder / f'out{i}').read_text() for i in range(2)]


@pytest.fixture(scope='module', autouse=True)
def compile_once(tmp_path_factory):
  """Later runs of the same program in this process read it back."""
  names = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('cache')),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': 0,
  }
  before = {name: getattr(run.jax.config, name) for name in names}
  for name, value in names.items():
    run.jax.config.update(name, value)
  yield
  for name, value in before.items():
    run.jax.config.update(name, value)


@pytest.fixture(scope='module')
def life(tmp_path_factory):
  """What was seen of the two starts, and how long the first took to end."""
  folder = tmp_path_factory.mktemp('life')
  workdir = folder / 'run'
  corpus = cases.write_corpus(folder / 'corpus')
  words = CONFIG.format(corpus=corpus, family=FAMILY, steps=STEPS)
  (folder / 'config.py').write_text(words)
  seen = {'folder': folder}

  processes = both(folder, workdir)
  until(workdir, 12, processes)
  processes[1].kill()
  began = time.monotonic()
  seen['killed'] = ends(folder, processes)
  seen['seconds'] = time.monotonic() - began
  seen['killed rows'] = metrics.read(workdir / 'metrics.jsonl')
  seen['saved'] = max(ocp_steps(workdir))

  processes = both(folder, workdir)
  seen['ended'] = ends(folder, processes)
  seen['rows'] = metrics.read(workdir / 'metrics.jsonl')
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
  assert f'/{STEPS}' not in said[1] and 'bits/byte' not in said[1]


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
  workdir = tmp_path / 'run'
  shutil.copytree(life['folder'] / 'run', workdir)
  for left, sizes in ((STEPS - 5, {'data': 2, 'fsdp': 1}), (STEPS - 2, {})):
    for step in ocp_steps(workdir):
      if step > left:
        shutil.rmtree(workdir / 'checkpoints' / str(step))
    assert max(ocp_steps(workdir)) == left
    config = config_of(life, **sizes)
    config.checkpoint.every = 1
    run.train(run.prepare(config, workdir))
  got, want = (
    curves(metrics.read(at / 'metrics.jsonl'))[0] for at in (workdir, alone[0])
  )
  np.testing.assert_allclose(got, want, 1e-5)


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(life, tmp_path):
  folder = life['folder']
  processes = both(folder, tmp_path)
  until(tmp_path, 12, processes)
  processes[1].send_signal(signal.SIGTERM)
  began = time.monotonic()
  codes, said = ends(folder, processes)
  assert codes == [128 + signal.SIGTERM] * 2, said
  assert time.monotonic() - began < 30
  rows = metrics.read(tmp_path / 'metrics.jsonl')
  step = rows[-1]['step']
  assert 12 <= step < STEPS
  for words in said:
    assert f'SIGTERM: saved checkpoint {step}' in words.splitlines()[-1]
  assert max(ocp_steps(tmp_path)) == step
  np.testing.assert_array_equal(curves(rows)[0], curves(life['rows'])[0][:step])
