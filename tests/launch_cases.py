"""A run small enough for a test: a corpus, a config, a model of two blocks."""

import os
import pathlib
import random
import subprocess
import sys

import jax
import numpy as np

from nestax.launch.configs import common

WORDS = ('state', 'memory', 'level', 'chunk', 'token', 'reads', 'writes')

# For processes of their own whose speed is no matter: they compile in a third
# of the time. Later JAX does not know the second flag, and would end.
_FLAGS = '--xla_cpu_parallel_codegen_split_count=1'
if jax.__version_info__ < (0, 11):
  _FLAGS += ' --xla_cpu_use_fusion_emitters=false'
QUICK = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'XLA_FLAGS': _FLAGS}
# Imports once; each line of words is a process, forked before JAX has threads.
_FORKS = """
import importlib, os, sys
module = importlib.import_module(sys.argv[1])
for i, words in enumerate(sys.argv[2:]):
  if not (child := os.fork()):
    for number, name in ((1, 'out'), (2, 'err')):
      os.dup2(os.open(f'{name}{i}', os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [f'nestax-{sys.argv[1].rpartition(".")[2]}', *words.split('|')]
    module.cli()
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  print(code, flush=True)
"""


def path():
  """`PYTHONPATH` of a process that imports these cases too."""
  here = str(pathlib.Path(__file__).parent)
  return os.pathsep.join([here, os.environ.get('PYTHONPATH', '')])


def forked(module, cwd, lines):
  """Runs a command's module once for each list of words, importing it once.

  Returns:
    What each printed, what it said on the error stream, and its exit code.
  """
  words = ['|'.join(line) for line in lines]
  codes = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', _FORKS, module, *words],
    cwd=cwd, capture_output=True, text=True, check=True,
    env=os.environ | QUICK | {'JAX_PLATFORMS': 'cpu'},
  ).stdout.split()  # fmt: skip
  return [
    ((cwd / f'out{i}').read_text(), (cwd / f'err{i}').read_text(), int(code))
    for i, code in enumerate(codes)
  ]


def write_corpus(folder):
  """Writes 40 documents of a few words; returns the glob that finds them."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = random.Random(0)
  for i in range(40):
    words = rng.choices(WORDS, k=rng.randint(10, 40))
    (folder / f'{i:02d}.txt').write_text(' '.join(words))
  return str(folder / '*.txt')


def make_config(corpus, family='transformer'):
  """A config for `run.prepare`; four steps of a model of width 8."""
  config = common.defaults()
  config.name = 'small'
  model = {
    'family': family,
    'D': 8,
    'F': 24,
    'N': 2,
    'H': 2,
    'dtype': 'float32',
  }
  config.model.update(model)
  config.model.memory.update({'chunk_mem': 8, 'chunk_rest': 8})
  config.data.update(
    {
      'source': 'text',
      'path': corpus,
      'length': 16,
      'valid_fraction': 0.2,
      'valid_batches': 2,
    }
  )
  config.mesh.data = 1
  config.train.update({'steps': 4, 'batch': 4, 'max_bad_steps': 2})
  config.optimizer = 'adamw'  # compiles in half the time
  config.opt.warmup = 1
  config.checkpoint.every = 2
  config.eval.every = 2
  config.log.update({'every': 1, 'sample_tokens': 0})
  return config


def curve(rows, split='train'):
  """What must be equal to the bit between two runs: (step, loss) pairs."""
  return [(r['step'], r['loss']) for r in rows if r['split'] == split]


def assert_same_bits(got, want):
  np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
