"""Cells are done once, and are refused if they are of others."""

import contextlib
import dataclasses
import functools
import subprocess
import sys
import threading

import pytest
import suite_cases as cases

from nestax.launch.evals import cells, running, suite


def test_a_stopped_suite_goes_on_with_the_cell_it_was_in(tmp_path, capfd):
  asked = suite.Asked(('a', 'b'), seeds=2, workdir=tmp_path)
  done = []
  with pytest.raises(cases.Stopped):
    running.run([cases.evaluation(done, ('hard', 'a'))], asked)
  assert done == [('easy', 'a'), ('easy', 'b')]
  # who waits is told what for
  assert capfd.readouterr().err.count(': begun\n') == 3
  done = []
  rows = running.run([cases.evaluation(done)], asked)
  assert done == [('hard', 'a'), ('hard', 'b')]
  assert len(rows) == 2 * 2 * 2
  assert rows[0]['scores'] == {'short': 90.0} and rows[0]['model'] == 'a'
  assert rows[-1]['scores'] == {'short': 51.0, 'long': None}
  assert all(row['device'] for row in rows)


def test_a_task_without_a_name_leaves_no_gap(tmp_path, capfd):
  def nameless(options, asked):
    easy, _ = whole.cells(options, asked)
    yield easy._replace(task='')

  whole = cases.evaluation([])
  asked = suite.Asked(('a',), seeds=1, workdir=tmp_path)
  running.run([whole._replace(cells=nameless)], asked)
  said = capfd.readouterr().err
  assert 'made a: begun\n' in said and 'made a: short 90\n' in said


def test_cells_of_other_settings_are_refused(tmp_path):
  asked = suite.Asked(('a',), seeds=1, workdir=tmp_path)
  running.run([cases.evaluation([])], asked)
  changed = suite.configure([cases.evaluation([])], ['made.bonus=1.5'])
  assert changed[0].options.bonus == 1.5
  with pytest.raises(
    cells.CellError, match='bonus is .* there and 1.5 here. Give'
  ):
    running.run(changed, asked)


def test_a_refusal_names_only_the_settings_that_differ(tmp_path):
  there = {'task': 'a', 'config': {'D': 8, 'cms': {'rate': 1.0}}, 'old': {}}
  asked = {'task': 'a', 'config': {'D': 8, 'cms': {'rate': 0.5}}, 'new': None}
  cells.write(tmp_path / 'a.json', there, [{'seed': 0}])
  with pytest.raises(cells.CellError) as caught:
    cells.read(tmp_path / 'a.json', asked)
  assert str(caught.value) == (
    f'{tmp_path}/a.json holds results of other settings: config.cms.rate is 1.0'
    ' there and 0.5 here; old is {} there and not set here; new is not set '
    'there and None here. Give another workdir'
  )


def test_one_task_can_be_done_alone(tmp_path):
  done = []
  asked = suite.Asked(('a',), tasks=('hard',), workdir=tmp_path)
  running.run([cases.evaluation(done)], asked)
  assert done == [('hard', 'a')]
  with pytest.raises(ValueError, match='the tasks are easy, hard'):
    asked = dataclasses.replace(asked, tasks=('soft',))
    running.run([cases.evaluation(done)], asked)


def test_evaluations_without_the_tasks_asked_for_are_said(tmp_path, capfd):
  def other(name):
    def cells(options, asked):
      for cell in cases.evaluation([]).cells(options, asked):
        yield cell._replace(task=f'{name} {cell.task}')

    return cases.evaluation([])._replace(name=name, cells=cells)

  three = [cases.evaluation([]), other('more'), other('most')]
  asked = suite.Asked(('a',), tasks=('easy', 'hard'), workdir=tmp_path)
  rows = running.run(three, asked)
  assert {row['suite'] for row in rows} == {'made'}
  line = '--tasks=easy,hard: more, most left out, without any of these\n'
  assert capfd.readouterr().err.count(line) == 1
  for all_have in (
    dataclasses.replace(asked, tasks=('hard', 'more easy', 'most hard')),
    dataclasses.replace(asked, tasks=()),
  ):
    running.run(three, all_have)
    assert 'left out' not in capfd.readouterr().err


def test_what_a_cell_lacks_is_said_before_anything_runs(tmp_path, capfd):
  asked = suite.Asked(('a', 'b'), seeds=1, workdir=tmp_path)

  def made(done, lacking):
    def check(model):
      if model == lacking:
        raise ValueError(f'no {model}')

    def cells(options, asked):
      for cell in whole.cells(options, asked):
        yield cell._replace(check=functools.partial(check, cell.model))

    whole = cases.evaluation(done)
    return whole._replace(cells=cells)

  done = []
  with pytest.raises(ValueError, match='no b'):
    running.run([made(done, 'b')], asked)
  assert not done and 'all cells' not in capfd.readouterr().err
  running.run([made(done, '')], asked)
  assert len(done) == 4
  # results that are there need no model any more
  assert len(running.run([made(done, 'b')], asked)) == len(done) == 4


def shared(name, done, gate, stop=False):
  """The evaluation as one process has it, whose first cell waits for `gate`."""

  def make(options, asked):
    def run(say, old, first):
      if first:
        done.append((name, 'begun'))
        assert gate.wait(20)
        if stop:
          raise cases.Stopped
      done.append((name, old.task, old.model))
      return old.run(say)

    for i, old in enumerate(whole.cells(options, asked)):
      run_it = functools.partial(run, old=old, first=i == 0)
      yield old._replace(run=run_it)

  whole = cases.evaluation([])
  return whole._replace(cells=make)


@pytest.mark.parametrize('stop', (False, True), ids=('ends', 'stopped'))
def test_the_same_command_twice_shares_the_cells(
  stop, tmp_path, capfd, monkeypatch
):
  monkeypatch.setattr(running, '_WAIT', 0.01)
  asked = suite.Asked(('a', 'b'), seeds=1, workdir=tmp_path)
  done, gate, rows = [], threading.Event(), {}

  def go(name, one):
    try:
      rows[name] = running.run([one], asked)
    except cases.Stopped:
      rows[name] = None

  slow = threading.Thread(
    target=go, args=('slow', shared('slow', done, gate, stop))
  )
  slow.start()
  while not done and slow.is_alive():  # until it is in its first cell
    slow.join(0.01)
  quick = threading.Thread(
    target=go, args=('quick', shared('quick', done, gate))
  )
  quick.start()
  while len(done) < 4 and quick.is_alive():
    quick.join(0.01)
  assert quick.is_alive()  # waits for the cell that the other is at
  gate.set()
  slow.join(60)
  quick.join(60)
  others = [('easy', 'b'), ('hard', 'a'), ('hard', 'b')]
  assert done[:4] == [('slow', 'begun'), *(('quick', *x) for x in others)]
  if stop:
    assert done[4:] == [('quick', 'begun'), ('quick', 'easy', 'a')]
    assert rows['slow'] is None
  else:
    assert done[4:] == [('slow', 'easy', 'a')]
    assert rows['slow'] == rows['quick']
  assert [(x['task'], x['model']) for x in rows['quick']] == [
    ('easy', 'a'),
    *others,
  ]
  said = capfd.readouterr().err
  assert said.count('waiting for other processes: made easy a\n') == 1


def test_a_cell_that_another_process_has_ended_is_not_done_again(
  tmp_path, monkeypatch
):
  asked = suite.Asked(('a',), seeds=1, workdir=tmp_path)
  want = running.run([cases.evaluation([])], asked)
  locks = [*suite.folder(tmp_path, 'made').glob('.*.lock')]
  assert len(locks) == 2
  monkeypatch.setattr(running.time, 'sleep', lambda _: pytest.fail('waits'))
  with contextlib.ExitStack() as held:
    for path in locks:
      assert held.enter_context(running.lock.free(path))
    rows = running.run([cases.evaluation(done := [])], asked)
  assert rows == want and not done


HOLDS = """
import pathlib, sys, time
from nestax.launch import lock
with lock.free(pathlib.Path(sys.argv[1])) as mine:
  print(mine, flush=True)
  time.sleep(600)
"""


def test_a_killed_process_leaves_its_cell_to_others(
  tmp_path, capfd, monkeypatch
):
  asked = suite.Asked(('a',), seeds=1, workdir=tmp_path)
  folder = suite.folder(tmp_path, 'made')
  folder.mkdir(parents=True)
  words = [sys.executable, '-c', HOLDS, folder / '.easy_a.lock']
  other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
  assert other.stdout.readline() == 'True\n'

  def wait(_):
    other.kill()
    other.wait()

  monkeypatch.setattr(running.time, 'sleep', wait)
  running.run([cases.evaluation(done := [])], asked)
  assert done == [('hard', 'a'), ('easy', 'a')]
  assert 'waiting for other processes: made easy a' in capfd.readouterr().err


def test_rows_of_fewer_seeds_are_whole_or_damaged(tmp_path):
  path, key = tmp_path / 'a.json', {'task': 'a', 'seeds': 2}
  assert cells.so_far(path, key, more=True) == ([], False)
  rows = [{'seed': 0}, {'seed': 1}]
  cells.write(path, key, rows)
  assert cells.so_far(path, key, more=False) == (rows, True)
  more = key | {'seeds': 3}
  assert cells.so_far(path, more, more=True) == (rows, False)
  for asked, adds in ((more, False), (key | {'seeds': 1}, True)):
    with pytest.raises(cells.CellError, match='holds results of 2 seeds'):
      cells.so_far(path, asked, adds)
  for kept in (rows[:1], []):  # cut off at the end of a line
    cells.write(path, key, kept)
    with pytest.raises(cells.CellError, match=f'rows: {len(kept)}, seeds: 2'):
      cells.so_far(path, key, more=True)
  for text in ('', '[1]\n', '{}\n1\n'):
    path.write_text(text)
    with pytest.raises(cells.CellError, match='not a key and its rows'):
      cells.so_far(path, key, more=True)


def test_a_damaged_cell_is_said_before_anything_runs(tmp_path):
  asked = suite.Asked(('a', 'b'), seeds=1, workdir=tmp_path)
  alone = dataclasses.replace(asked, models=('b',))
  running.run([cases.evaluation([])], alone)
  (suite.folder(tmp_path, 'made') / 'hard_b.json').write_text('{')
  with pytest.raises(cells.CellError, match='hard_b.json is damaged'):
    running.run([cases.evaluation(done := [])], asked)
  assert not done
