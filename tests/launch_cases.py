"""A run small enough for a test: a corpus, a config, a model of two blocks."""

import random

import numpy as np

from nestax.launch.configs import common

WORDS = ('state', 'memory', 'level', 'chunk', 'token', 'reads', 'writes')


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
