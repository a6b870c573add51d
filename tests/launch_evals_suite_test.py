"""Cells are done once, are refused if they are of others, and are reported."""

import dataclasses
import functools
import json

import pytest

from nestax.launch.evals import cells, entrants, scoreboard, suite


@dataclasses.dataclass(frozen=True)
class Options:
  bonus: float = 0.0


class Stopped(Exception):
  pass


def evaluation(done, stop_at=None, **fields):
  """Two tasks; `done` gathers what was worked at."""

  def make(options, asked):
    for task in ('easy', 'hard'):
      for model in asked.models:

        def run(say, task=task, model=model):
          if (task, model) == stop_at:
            raise Stopped
          done.append((task, model))
          say(1, 2)
          level = {'easy': 90.0, 'hard': 50.0}[task] + options.bonus
          scores = {'short': level}
          if task == 'hard':
            scores['long'] = float('nan') if model == 'b' else level - 10
          return [
            {'seed': s, 'scores': {k: x + s for k, x in scores.items()}}
            for s in range(asked.seeds)
          ]

        key = {'bonus': options.bonus, 'seeds': asked.seeds}
        yield suite.Cell(task, model, key, run)

  fields = {'words': 'Made up, %.'} | fields
  return suite.Evaluation('made', Options(), make, **fields)


def test_a_stopped_suite_goes_on_with_the_cell_it_was_in(tmp_path, capfd):
  asked = suite.Asked(('a', 'b'), seeds=2, workdir=tmp_path)
  done = []
  with pytest.raises(Stopped):
    suite.run([evaluation(done, ('hard', 'a'))], asked)
  assert done == [('easy', 'a'), ('easy', 'b')]
  # who waits is told what for
  assert capfd.readouterr().err.count(': begun\n') == 3
  done = []
  rows = suite.run([evaluation(done)], asked)
  assert done == [('hard', 'a'), ('hard', 'b')]
  assert len(rows) == 2 * 2 * 2
  assert rows[0]['scores'] == {'short': 90.0} and rows[0]['model'] == 'a'
  assert rows[-1]['scores'] == {'short': 51.0, 'long': None}
  assert all(row['device'] for row in rows)


def test_a_task_without_a_name_leaves_no_gap(tmp_path, capfd):
  def nameless(options, asked):
    easy, _ = whole.cells(options, asked)
    yield easy._replace(task='')

  whole = evaluation([])
  asked = suite.Asked(('a',), seeds=1, workdir=tmp_path)
  suite.run([whole._replace(cells=nameless)], asked)
  said = capfd.readouterr().err
  assert 'made a: begun\n' in said and 'made a: short 90\n' in said


def test_cells_of_other_settings_are_refused(tmp_path):
  asked = suite.Asked(('a',), seeds=1, workdir=tmp_path)
  suite.run([evaluation([])], asked)
  changed = suite.configure([evaluation([])], ['made.bonus=1.5'])
  assert changed[0].options.bonus == 1.5
  with pytest.raises(
    cells.CellError, match='bonus is .* there, 1.5 here: give'
  ):
    suite.run(changed, asked)


def test_a_refusal_names_only_the_settings_that_differ(tmp_path):
  there = {'task': 'a', 'config': {'D': 8, 'cms': {'rate': 1.0}}, 'old': {}}
  asked = {'task': 'a', 'config': {'D': 8, 'cms': {'rate': 0.5}}, 'new': None}
  cells.write(tmp_path / 'a.json', there, [{'seed': 0}])
  with pytest.raises(cells.CellError) as caught:
    cells.read(tmp_path / 'a.json', asked)
  assert str(caught.value) == (
    f'{tmp_path}/a.json holds results of other settings, config.cms.rate is 1.0'
    ' there, 0.5 here, old is {} there, not set here, new is not set there, '
    'None here: give another workdir'
  )


def test_one_task_can_be_done_alone(tmp_path):
  done = []
  asked = suite.Asked(('a',), tasks=('hard',), workdir=tmp_path)
  suite.run([evaluation(done)], asked)
  assert done == [('hard', 'a')]
  with pytest.raises(ValueError, match='the tasks are easy, hard'):
    asked = dataclasses.replace(asked, tasks=('soft',))
    suite.run([evaluation(done)], asked)


def test_evaluations_without_the_tasks_asked_for_are_said(tmp_path, capfd):
  def other(name):
    def cells(options, asked):
      for cell in evaluation([]).cells(options, asked):
        yield cell._replace(task=f'{name} {cell.task}')

    return evaluation([])._replace(name=name, cells=cells)

  three = [evaluation([]), other('more'), other('most')]
  asked = suite.Asked(('a',), tasks=('easy', 'hard'), workdir=tmp_path)
  rows = suite.run(three, asked)
  assert {row['suite'] for row in rows} == {'made'}
  line = '--tasks=easy,hard: more, most left out, without any of these\n'
  assert capfd.readouterr().err.count(line) == 1
  for all_have in (
    dataclasses.replace(asked, tasks=('hard', 'more easy', 'most hard')),
    dataclasses.replace(asked, tasks=()),
  ):
    suite.run(three, all_have)
    assert 'left out' not in capfd.readouterr().err


def test_words_for_nobody_are_refused():
  for words, wrong in (
    ('mode.bonus=1', 'one of made'),
    ('made.bonny=1', 'there are bonus'),
    ('made.bonus=x', 'is no number'),
  ):
    with pytest.raises(ValueError, match=wrong):
      suite.configure([evaluation([])], [words])


def test_the_report_has_every_cell_of_the_workdir(tmp_path):
  paper = {'A': {'easy': 99.0, 'hard long': 12.5, 'odd': 1.0}, 'B': {'odd': 1}}
  made = evaluation([], paper=paper, source='its paper')
  asked = suite.Asked(('a',), seeds=3, workdir=tmp_path)
  suite.run([made], asked)
  rows = suite.run([made], dataclasses.replace(asked, models=('b',)))
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
  made = evaluation(done := [], groups=lambda options: groups, **fields)
  asked = suite.Asked(('a',), seeds=3, tasks=('both',), workdir=tmp_path)
  words = scoreboard.write([made], tmp_path, suite.run([made], asked))
  assert done == [('easy', 'a'), ('hard', 'a')]
  lines = words.splitlines()
  assert '| a | 71.0 ± 1.0 | 71.0 | 3 |' in lines
  assert '| A (its paper) | 7 | - | - |' in lines
  assert '| a | 51.0 ± 1.0 | 41.0 ± 1.0 | 91.0 ± 1.0 | 61.0 | 3 |' in lines
  assert 'both 2.' in words and words.count('its paper)') == 1
  # a setting that is missing: no mean, and nothing of the paper's
  alone = dataclasses.replace(asked, models=('b',), tasks=('easy',))
  words = scoreboard.write([made], tmp_path, suite.run([made], alone))
  lines = [line for line in words.splitlines() if line.startswith('| b')]
  assert lines == ['| b | - | - | 91.0 ± 1.0 | - | 3 |']
  nothing = made._replace(groups=lambda options: {})
  words = scoreboard.write([nothing], tmp_path, [])
  assert 'its paper)' not in words and 'means over all settings' in words


def test_scores_along_an_axis_are_lines(tmp_path):
  score = scoreboard.Score(50.0, 1.0, 3)
  scores = {'a': {('one', '1024'): score, ('one', '512'): score}}
  board = scoreboard.Board(
    evaluation([], axis='tokens'), scores, list(scores['a'])
  )
  (panel,) = scoreboard._lines(board).axes
  line = panel.containers[0].lines[0]
  assert list(line.get_xdata()) == [512, 1024]
  assert panel.get_xlabel() == 'tokens'


def test_what_a_cell_lacks_is_said_before_anything_runs(tmp_path, capfd):
  asked = suite.Asked(('a', 'b'), seeds=1, workdir=tmp_path)

  def made(done, lacking):
    def check(model):
      if model == lacking:
        raise ValueError(f'no {model}')

    def cells(options, asked):
      for cell in whole.cells(options, asked):
        yield cell._replace(check=functools.partial(check, cell.model))

    whole = evaluation(done)
    return whole._replace(cells=cells)

  done = []
  with pytest.raises(ValueError, match='no b'):
    suite.run([made(done, 'b')], asked)
  assert not done and 'all cells' not in capfd.readouterr().err
  suite.run([made(done, '')], asked)
  assert len(done) == 4
  # results that are there need no model any more
  assert len(suite.run([made(done, 'b')], asked)) == len(done) == 4


def test_models_are_families_with_keys_or_paths(tmp_path):
  base = {'D': 16, 'memory': {'chunk_mem': 8, 'chunk_rest': 8}}
  word = 'hope:memory.eta_max=1.0;cms.periods=(8,16)'
  cfg = entrants.config(word, base)
  assert (cfg.family, cfg.D, cfg.V) == ('hope', 16, 272)
  assert cfg.memory.chunk_mem == 8 and cfg.memory.eta_max == 1.0
  assert cfg.cms.periods == (8, 16)
  for wrong, words in (
    ('hop', 'trains its models; give families, of .*hope'),
    (str(tmp_path), 'trains its models; give families, of .*hope'),
    ('hope:eta=1', "there is no key 'eta'"),
    ('hope:D=1.5', 'D is a int'),
  ):
    with pytest.raises(ValueError, match=words):
      entrants.config(wrong, base)
  assert entrants.is_trained(str(tmp_path))
  for lacks in (entrants.load, entrants.check):
    with pytest.raises(ValueError, match='neither a folder of a run nor'):
      lacks(str(tmp_path / 'nothing'))
  entrants.check(str(tmp_path))
