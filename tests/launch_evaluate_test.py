"""The stream evaluation: settings, table, files, and what it refuses."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from nestax.launch import trained
from nestax.launch.data import tokenizers
from nestax.launch.evals import novel, streaming
from nestax.models import language_model
from nestax.models.config import ModelConfig


@pytest.fixture(scope='module')
def made():
  cfg = ModelConfig.from_dict(
    {
      'family': 'hope_attention',
      'D': 16,
      'H': 2,
      'F': 24,
      'dtype': 'float32',
      'cms': {'periods': (4, 8), 'blocks': '1', 'rate': 0.3},
    }
  )
  model = language_model.LanguageModel(cfg)
  tokens = np.zeros((1, 1), np.int32)
  params = jax.jit(model.init)(jax.random.key(0), None, tokens)['params']
  return trained.Trained(model, nn.unbox(params), tokenizers.load('bytes'), 0)


def test_the_ways_to_read_are_named():
  got = novel.modes(['on', 'off', 'reset:16'], 8, 32)
  assert got['reset:16'] == streaming.Settings('on', 16, 8, 32)
  for wrong in ('of', 'reset', 'reset:0', 'reset:x'):
    with pytest.raises(ValueError, match='on, off or reset:TOKENS'):
      novel.modes([wrong], 8, 32)
  with pytest.raises(ValueError, match='multiple of piece=8'):
    novel.modes(['reset:12'], 8, 32)


def test_a_text_is_read_every_way_and_written_down(made, tmp_path):
  text = tmp_path / 'text.md'
  text.write_text('round and round it goes, ' * 3)
  ways = novel.modes(['on', 'off', 'reset:16'], 8, 32)
  got = novel.run(made, text, ways, tmp_path / 'out', limit=41)
  assert {name: row['tokens'] for name, row in got.items()} == dict.fromkeys(
    ways, 40.0
  )
  assert got['on']['bits_per_byte'] < got['off']['bits_per_byte']
  assert got['reset:16']['nats'] != got['on']['nats']
  rows = [*map(json.loads, (tmp_path / 'out/stream.jsonl').open())]
  assert len(rows) == 15
  last = [row for row in rows if row['levels'] == 'on'][-1]
  assert last['commits'] == [10, 5]
  assert min(last['moved']) > 0
  assert (tmp_path / 'out/stream.png').stat().st_size > 1000
  again = json.loads((tmp_path / 'out/summary.json').read_text())
  assert again['on']['perplexity'] == got['on']['perplexity']


def test_the_bar_says_that_its_figure_is_of_the_last_piece(made, capsys):
  tokens = np.arange(24, dtype=np.int32) + 97
  how = novel.modes(['on'], 8, 32)['on']
  last = novel.read(made, tokens, 'on', how)[-1]
  rate = last.nats / last.bytes / np.log(2)
  assert f'last piece: {rate:.3f} bits/byte' in capsys.readouterr().err


def test_a_text_that_is_not_there_is_named_with_its_flag(made, tmp_path):
  with pytest.raises(
    FileNotFoundError, match='--text=nowhere: there is no such file'
  ):
    novel.run(made, 'nowhere', novel.modes(['on'], 8, 32), tmp_path)


def test_levels_that_do_not_learn_are_refused(made, tmp_path):
  plain = made._replace(model=streaming.frozen(made.model))
  with pytest.raises(ValueError, match='no level of this model learns'):
    novel.run(plain, 'text', novel.modes(['on'], 8, 32), tmp_path)
  stack = novel.Stack('groups', ('4',), 'all', 0.1)
  with pytest.raises(ValueError, match='one of them'):
    novel.load(None, None, stack)
  with pytest.raises(ValueError, match='pretrained'):
    novel.load('run', None, stack)


@pytest.mark.parametrize(
  'wrong, words',
  [
    ({'how': 'group'}, '^--stack=group: one of groups, copies$'),
    ({'periods': ('4', 'x')}, '^--periods=4,x: whole numbers of tokens$'),
  ],
)
def test_a_stack_is_checked_before_a_model_is_loaded(wrong, words):
  stack = novel.Stack('groups', ('4',), 'all', 0.1)._replace(**wrong)
  with pytest.raises(ValueError, match=words):
    novel.load(None, 'nowhere.gguf', stack)
