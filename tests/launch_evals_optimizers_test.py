"""The comparison goes through its stages, cell by cell."""

import launch_cases as cases
import pytest

from nestax.launch.evals import (
  cells,
  contenders,
  optimizers,
  orthogonal,
  pretraining,
  sweep,
)
from nestax.models.config import ModelConfig


def small():
  task = orthogonal.task(2, 8, tasks=2, rank=2, outputs=4)
  shapes = optimizers._shapes(task)
  make = {
    name: contenders.make(name, shapes, orthogonal.RULES, lambda _: 1.0, 0.0)
    for name in ('adamw', 'm3')
  }
  return optimizers.Suite(task, make, (0.01, 0.1), 2, 8, 4)


def test_cells_that_are_done_are_not_done_again(tmp_path, monkeypatch, capsys):
  suites = {'orthogonal': small}
  optimizers.compare(suites, tmp_path, ['m3'], ['train'])
  assert 'orthogonal m3: step 8/8' in capsys.readouterr().out
  trained, really = [], optimizers.sweep.run

  def run(*arguments, **more):
    trained.append(arguments)
    return really(*arguments, **more)

  monkeypatch.setattr(sweep, 'run', run)
  optimizers.compare(suites, tmp_path, [], ['train'])
  assert len(trained) == 1  # adamw alone
  monkeypatch.setattr(sweep, 'seconds_per_step', lambda *_: 0.5)
  optimizers.compare(suites, tmp_path, [], ['time', 'report'])
  printed = capsys.readouterr().out
  assert '| 500 |' in printed and '| adamw |' in printed
  assert (tmp_path / 'curves.png').exists()


def test_a_cell_of_other_settings_is_refused(tmp_path):
  path = tmp_path / 'cell.json'
  cells.write(path, {'steps': 8}, [{'loss': 1.0}])
  assert cells.read(path, {'steps': 8}) == [{'loss': 1.0}]
  assert cells.read(tmp_path / 'other.json', {}) is None
  with pytest.raises(cells.CellError, match='another workdir'):
    cells.read(path, {'steps': 9})


def test_other_data_is_another_cell(tmp_path, monkeypatch):
  monkeypatch.setattr(sweep, 'seconds_per_step', lambda *_: 0.5)
  optimizers.compare({'vit': small}, tmp_path, ['m3'], ['train', 'time'])
  others = {'vit': lambda: small()._replace(data='mnist.npz')}
  for stage in ('train', 'time'):
    with pytest.raises(cells.CellError, match='mnist.npz'):
      optimizers.compare(others, tmp_path, ['m3'], [stage])


def test_a_language_model_is_a_task(tmp_path):
  config = cases.make_config(cases.write_corpus(tmp_path / 'corpus'))
  config.optimizer = 'm3'
  task = pretraining.task(config, seeds=2)
  tokens = task.data['train']['tokens']
  assert tokens.shape == (2, 4, 4, 16)
  assert (tokens[0] != tokens[1]).any()  # each seed has its own order
  make = contenders.of_config(config, optimizers._shapes(task))
  rows = sweep.run(task, make, [0.02], 2, 4, 2)
  assert rows[-1]['train'] < rows[0]['train']
  assert 0 < rows[-1]['valid bits/byte'] < 9


def test_one_batch_of_validation_is_too_few(tmp_path):
  config = cases.make_config(cases.write_corpus(tmp_path / 'corpus'))
  config.data.valid_batches = 1
  with pytest.raises(ValueError, match='raise data.valid_batches'):
    pretraining.task(config, seeds=1)


@pytest.mark.parametrize('steps', [8, 64, 101, 512])
def test_evaluations_divide_the_steps(steps):
  assert steps % optimizers._every(steps, 64) == 0


def test_the_suite_of_language_models_is_the_quickstart(monkeypatch):
  seen = {}

  def task(config, seeds):
    seen.update(config=config, seeds=seeds)
    raise KeyboardInterrupt

  monkeypatch.setattr(pretraining, 'task', task)
  with pytest.raises(KeyboardInterrupt):
    optimizers.make_lm(3)
  assert ModelConfig.from_dict(seen['config'].model).D == 128
  assert seen['config'].train.steps == 500 and seen['seeds'] == 3
