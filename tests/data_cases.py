"""What the tests of the pipeline share: a small corpus, settings, compares."""

import collections
import itertools
import random
import re

import numpy as np
from ml_collections import ConfigDict

from nestax.launch.data import tokenizers

TRAIN = {'batch': 4, 'carry_state': False}
DATA = {
  'source': 'text',
  'text_key': 'text',
  'tokenizer': 'bytes',
  'boundary': 'reset',
  'length': 16,
  'valid_fraction': 0.2,
  'valid_batches': 3,
  'shuffle': True,
  'shards': 1,
  'workers': 0,
  'prefetch': 0,
}
ALL = 10_000  # validation batches: more than there are


def settings(path, seed=3, **overrides):
  train = {key: overrides.pop(key, value) for key, value in TRAIN.items()}
  data = DATA | {'path': str(path)} | overrides
  return ConfigDict({'seed': seed, 'data': data, 'train': train})


def write_corpus(root):
  """60 documents `<12>words...`, each told by its number; gives their glob."""
  rng = random.Random(0)
  for i in range(60):
    words = ['alpha', 'beta', 'caf\u00e9', '\n']
    text = ' '.join(rng.choices(words, k=rng.randint(3, 40)))
    (root / f'{i:02d}.txt').write_text(f'<{i:02d}>{text}')
  return root / '*.txt'


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def assert_same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def numbers(batches):
  """How often each document of the corpus starts in the batches."""
  tokens = np.concatenate([b['tokens'].ravel() for b in batches])
  text = tokenizers.load('bytes').decode(tokens.tolist())
  return collections.Counter(int(i) for i in re.findall(r'<(\d\d)>', text))


def train_bpe(path):
  import tokenizers as hf

  model = hf.Tokenizer(hf.models.BPE())
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=True)
  model.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=280,
    show_progress=False,
    initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
  )
  model.train_from_iterator(['alpha beta caf\u00e9 <0 <1 ' * 20], trainer)
  model.save(str(path))
  return str(path)
