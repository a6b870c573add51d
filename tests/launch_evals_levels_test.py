"""More and more levels, everything else equal: cells, table, refusals."""

import functools

import jax
import launch_cases as cases
import numpy as np
import pytest

from nestax.launch import command
from nestax.launch.evals import cells as kept
from nestax.launch.evals import levels, novel, reading
from nestax.models import language_model
from nestax.models.config import ModelConfig


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  corpus = cases.write_corpus(tmp_path_factory.mktemp('corpus'))
  config = cases.make_config(corpus, 'hope_attention')
  config.model.N = 1
  cms = {'periods': (4, 8), 'multiple': 4, 'blocks': 'all', 'rate': 0.3}
  config.model.cms.update(cms | {'differentiate': 'first_order'})
  return config


def test_models_of_any_count_are_equal_but_for_what_learns(config):
  shapes = []
  for count in range(3):
    made = levels.with_levels(config, count)
    cfg = ModelConfig.from_dict(made.model)
    assert (cfg.stream.periods if cfg.stream else ()) == (4, 8)[:count]
    params = language_model.abstract_params(cfg)
    shapes.append({k: v for k, v in params.items() if k != 'log_rate'})
  leaves = [[x.shape for x in jax.tree.leaves(tree)] for tree in shapes]
  assert leaves[0] == leaves[1] == leaves[2]


def test_what_cannot_be_counted_is_refused(config):
  with pytest.raises(ValueError, match=r'3 levels of the periods \(4, 8\)'):
    levels.with_levels(config, 3)
  config = config.copy_and_resolve_references()
  config.model.cms.blocks = 'none'
  with pytest.raises(ValueError, match="blocks is 'none'"):
    levels.with_levels(config, 1)


def test_cells_are_trained_and_read_once(config, tmp_path, monkeypatch):
  text = tmp_path / 'novel.txt'
  text.write_text('state memory level ' * 8)
  counts = (0, 2)
  loads = {
    k: functools.partial(
      levels.train, levels.with_levels(config, k), tmp_path / f'levels-{k}'
    )
    for k in counts
  }
  where = str(text), 100, 32, tmp_path / 'out'
  words = reading.compare(loads, {'config': 'a'}, *where)
  assert (tmp_path / 'out/table.md').read_text() == words + '\n'
  (frozen,), (learning,) = (
    kept.read(tmp_path / f'out/cells/{k}.json') for k in counts
  )
  assert frozen['tokens'] == learning['tokens'] == 99
  assert frozen['bits_per_byte'] == frozen['frozen_bits_per_byte']
  assert learning['bits_per_byte'] < learning['frozen_bits_per_byte']
  assert learning['periods'] == [4, 8] and len(learning['rates']) == 2
  less = 1 - learning['bits_per_byte'] / frozen['bits_per_byte']
  assert f'| 2 | 4 8 | {learning["valid"]:.4f} |' in words
  assert f'| {less:.1%} |' in words

  def fail():
    raise AssertionError('the cell was there')

  again = reading.compare({0: fail, 2: fail}, {'config': 'a'}, *where)
  assert again == words
  with pytest.raises(kept.CellError):
    reading.compare({0: fail}, {'config': 'b'}, *where)


def test_the_rate_that_reads_best_is_picked(monkeypatch):
  nats = {0.1: 3.0, 0.3: 2.0, 1.0: 9.0}
  monkeypatch.setattr(reading, 'read', lambda made, *_: {'nats': nats[made]})
  stacks = {rate: rate for rate in nats}
  got, said = reading.pick(stacks, np.zeros(8, np.int32), 8)
  assert got == 0.3
  assert said == {'picked': 0.3, 'tried': [0.1, 0.3, 1.0]}


def test_a_pretrained_model_can_compute_in_bfloat16(config, tmp_path):
  levels.train(levels.with_levels(config, 0), tmp_path)
  none = novel.Stack('', (), 'all', 0.0)
  assert novel.load(tmp_path, None, none).model.cfg.dtype == 'float32'
  made = novel.load(tmp_path, None, none, 'bfloat16')
  assert made.model.cfg.dtype == 'bfloat16'


def test_the_command_refuses_in_words(capsys):
  parse = command.parser('levels', '', levels.FLAGS, 'novels')
  with pytest.raises(SystemExit) as stop:
    parse(['levels', '--levels=0'])
  assert stop.value.code == 2 and 'novel' in capsys.readouterr().err
  words = ['--novel=x.txt', '--model=m.gguf', '--levels=0']
  assert levels.main(parse(['levels', *words])) == 2
  assert (
    capsys.readouterr().err
    == 'levels: --tune=TEXT: a text to pick the inner rate on is needed\n'
  )
  assert levels.main(parse(['levels', *words, '--tune=./x.txt'])) == 2
  assert 'picked on what is then measured' in capsys.readouterr().err
