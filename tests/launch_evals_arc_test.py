"""Grids are right or they are not; a task's pairs are what is read."""

import json
import os
import pathlib

import numpy as np
import pytest
import sleep_cases as cases

from nestax.launch import trained
from nestax.launch.data import tokenizers
from nestax.launch.evals import arc, contexts, learners, suite, writing

ROOT = pathlib.Path(__file__).parents[1]
SHARED = pathlib.Path(
  os.environ.get('NESTAX_DATA', ROOT.parent / 'shared/data')
)
TASK = {
  'train': [
    {'input': [[1, 2]], 'output': [[2, 1]]},
    {'input': [[3], [4]], 'output': [[4], [3]]},
  ],
  'test': [
    {'input': [[5, 6]], 'output': [[6, 5]]},
    {'input': [[7]], 'output': [[7]]},
  ],
}
READ = 'input:\n12\noutput:\n21\n\ninput:\n3\n4\noutput:\n4\n3\n\n'


def test_a_grid_is_right_as_a_whole_and_its_cells_one_by_one():
  assert arc.score('12\n34\n', '12\n34\n') == (True, 1.0)
  assert arc.score('\n12\n 34 \n\ninput:', '12\n34') == (True, 1.0)
  assert arc.score('12\n35', '12\n34\n') == (False, 0.75)
  assert arc.score('12\n3', '12\n34') == (False, 0.0)
  assert arc.score('', '1') == (False, 0.0)


def test_pairs_are_read_then_tests_are_asked(tmp_path, monkeypatch):
  for name in 'ab':
    (tmp_path / f'{name}.json').write_text(json.dumps(TASK))
  bytes_ = tokenizers.load('bytes')
  cfg = cases.config('transformer')
  made = trained.Trained(
    learners.language_model.LanguageModel(cfg), None, bytes_, 0, 'bytes'
  )
  seen = []

  def read(cfg, params, row, window, piece):
    seen.append(bytes_.decode(row[0].tolist()))
    assert row[0, 0] == bytes_.bos
    return 'state'

  def write(asked, tokenizer, prompts, most, stops):
    assert asked.begun == 'begun' and stops == ['\n\n']
    seen.append([bytes_.decode(prompt) for prompt in prompts])
    return ['65', '8']

  monkeypatch.setattr(contexts, 'read', read)
  monkeypatch.setattr(contexts, 'row', lambda state, i: 'begun')
  monkeypatch.setattr(writing, 'write', write)
  monkeypatch.setattr(learners, 'load', lambda word: made)
  arc._model.cache_clear()
  options = arc.Options(str(tmp_path / '*.json'), most=1, passes=2)
  (cell,) = arc.cells(options, suite.Asked(('m',)))
  (row,) = cell.run(lambda done, of: None)
  assert row['scores'] == {'right': 50.0, 'cells': 50.0} and row['tests'] == 2
  asked = ['input:\n56\noutput:\n', 'input:\n7\noutput:\n']
  assert seen == [READ * 2, asked]
  json.dumps(cell.key)
  with pytest.raises(FileNotFoundError, match='arc.tasks=x.json'):
    list(arc.cells(arc.Options('x.json'), suite.Asked(('m',))))


@pytest.mark.skipif(not SHARED.exists(), reason='the data are not here')
def test_the_real_tasks_are_read():
  glob = str(SHARED / 'arc_agi_1' / 'data' / 'training' / '*.json')
  (cell,) = arc.cells(arc.Options(glob, most=20), suite.Asked(('m',)))
  assert cell.model == 'm' and np.isfinite(cell.key['most'])
