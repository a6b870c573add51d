"""Tables have all cells of the workdir, beside what papers print."""

import dataclasses
import json
import threading

import suite_cases as cases

from nestax.launch.evals import running, scoreboard, suite


def test_the_report_has_every_cell_of_the_workdir(tmp_path):
  paper = {'A': {'easy': 99.0, 'hard long': 12.5, 'odd': 1.0}, 'B': {'odd': 1}}
  made = cases.evaluation([], paper=paper, source='its paper')
  asked = suite.Asked(('a',), seeds=3, workdir=tmp_path)
  running.run([made], asked)
  rows = running.run([made], dataclasses.replace(asked, models=('b',)))
  words = scoreboard.write([made], tmp_path, rows)
  assert (tmp_path / 'table.md').read_text() == words + '\n'
  for line in (
    '| model | easy | hard short | hard long | average | seeds |',
    '| b | 91.0 ± 1.0 | 51.0 ± 1.0 | nan ± nan | nan | 3 |',
    '| a | 91.0 ± 1.0 | 51.0 ± 1.0 | 41.0 ± 1.0 | 61.0 | 3 |',
    '| A (its paper) | 99 | - | 12.5 | - | - |',
  ):
    assert line in words.splitlines()
  assert 'B (' not in words
  lines = [*map(json.loads, (tmp_path / 'results.jsonl').open())]
  assert [(x['task'], x['model']) for x in lines] == [
    ('easy', 'b'),
    ('hard', 'b'),
    ('easy', 'a'),
    ('hard', 'a'),
  ]
  assert lines[1]['scores']['long'] == {
    'mean': None,
    'spread': None,
    'values': [None] * 3,
  }
  assert lines[3]['scores']['long']['values'] == [40.0, 41.0, 42.0]
  assert (tmp_path / 'made.png').stat().st_size > 1000


def test_settings_of_one_task_are_averaged_beside_the_paper(tmp_path):
  fields = {'paper': {'A': {'both': 7.0, 'easy': 5.0}}, 'source': 'its paper'}
  groups = {'both': ['hard', 'easy']}  # the order of columns too
  made = cases.evaluation(done := [], groups=lambda options: groups, **fields)
  asked = suite.Asked(('a',), seeds=3, tasks=('both',), workdir=tmp_path)
  words = scoreboard.write([made], tmp_path, running.run([made], asked))
  assert done == [('easy', 'a'), ('hard', 'a')]
  lines = words.splitlines()
  assert '| a | 71.0 ± 1.0 | 71.0 | 3 |' in lines
  assert '| A (its paper) | 7 | - | - |' in lines
  assert '| a | 51.0 ± 1.0 | 41.0 ± 1.0 | 91.0 ± 1.0 | 61.0 | 3 |' in lines
  assert 'both 2.' in words and words.count('its paper)') == 1
  # a setting that is missing: no mean, and nothing of the paper's
  alone = dataclasses.replace(asked, models=('b',), tasks=('easy',))
  words = scoreboard.write([made], tmp_path, running.run([made], alone))
  lines = [line for line in words.splitlines() if line.startswith('| b')]
  assert lines == ['| b | - | - | 91.0 ± 1.0 | - | 3 |']
  nothing = made._replace(groups=lambda options: {})
  words = scoreboard.write([nothing], tmp_path, [])
  assert 'its paper)' not in words and 'means over all settings' in words


def test_scores_along_an_axis_are_lines(tmp_path):
  score = scoreboard.Score(50.0, 1.0, 3)
  scores = {'a': {('one', '1024'): score, ('one', '512'): score}}
  board = scoreboard.Board(
    cases.evaluation([], axis='tokens'), scores, list(scores['a'])
  )
  (panel,) = scoreboard._lines(board).axes
  line = panel.containers[0].lines[0]
  assert list(line.get_xdata()) == [512, 1024]
  assert panel.get_xlabel() == 'tokens'


def test_reports_are_written_one_after_another(tmp_path):
  """Who read the cells before is not the last to write them."""
  made = cases.evaluation([])
  asked = suite.Asked(('a',), seeds=1, workdir=tmp_path)
  rows = running.run([made], asked)
  with scoreboard.lock.free(tmp_path / '.report.lock') as mine:
    assert mine
    late = threading.Thread(
      target=scoreboard.write, args=([made], tmp_path, rows)
    )
    late.start()
    late.join(0.2)
    assert late.is_alive() and not (tmp_path / 'table.md').exists()
    running.run([made], dataclasses.replace(asked, models=('b',)))
  late.join(60)
  assert '| b |' in (tmp_path / 'table.md').read_text()
  assert not [*tmp_path.glob('table.[0-9]*')]
