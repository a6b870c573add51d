"""Seeds are added to a table that is there: only they are trained."""

import dataclasses

import echo_cases as echo
import numpy as np
import pytest

from nestax.launch.evals import (
  cells,
  language,
  running,
  scoreboard,
  suite,
  sweep,
  trials,
)

ONE = dataclasses.replace(echo.TRAINING, rates=(3e-2,))


def table(workdir, training, seeds, models=('transformer',)):
  asked = suite.Asked(models, seeds=seeds, workdir=workdir)
  made = [*trials.cells([echo.PROBLEM], training, asked)]
  one = suite.Evaluation('some', None, lambda *_: iter(made), '')
  return running.run([one], asked)


@pytest.fixture
def trained(monkeypatch):
  """Which seeds were trained side by side, a tuple a program."""
  seen, really = [], sweep.run

  def run(task, make, rates, seeds, steps, every, say, enough, first):
    seen.append((*range(first, seeds),))
    return really(task, make, rates, seeds, steps, every, say, enough, first)

  monkeypatch.setattr(trials.sweep, 'run', run)
  return seen


def test_more_seeds_are_added_to_those_that_are_there(tmp_path, trained):
  (first,) = table(tmp_path, ONE, 1)
  three = table(tmp_path, ONE, 3)
  assert trained == [(0,), (1, 2)]
  assert three[0] == first and [row['seed'] for row in three] == [0, 1, 2]
  assert table(tmp_path, ONE, 3) == three and len(trained) == 2
  # as if all had been trained at once
  at_once = table(tmp_path / 'at once', ONE, 3)
  for row, want in zip(three, at_once, strict=True):
    for name in ('loss', 'valid', 'step'):
      np.testing.assert_allclose(row[name], want[name], rtol=1e-4)
    assert row['scores'] == want['scores'] and row.keys() == want.keys()
  key, _ = cells.load(tmp_path / 'some/cells/echo_transformer.json')
  assert key['seeds'] == 3


def test_a_tables_line_says_where_and_how_long_all_seeds_ran(
  tmp_path, monkeypatch
):
  for device, seeds in (('one', 1), ('two', 3), ('none', 3)):
    monkeypatch.setattr(running.timing, 'device', lambda device=device: device)
    rows = table(tmp_path, ONE, seeds)
  assert [row['device'] for row in rows] == ['one', 'two', 'two']
  line = scoreboard._line(rows)
  assert line['seeds'] == [0, 1, 2] and line['device'] == 'one and two'
  took = rows[0]['seconds'] + rows[1]['seconds']
  assert line['seconds'] == pytest.approx(took, abs=0.002)


@pytest.mark.parametrize(
  'lines, words',
  [(0, 'not a key and its rows'), (1, 'rows: 0, seeds: 1'), (-1, 'damaged')],
)
def test_a_damaged_cell_is_said_and_left(lines, words, tmp_path, trained):
  table(tmp_path, ONE, 1)
  path = tmp_path / 'some/cells/echo_transformer.json'
  text = path.read_text()
  cut = text[:-9] if lines < 0 else ''.join(text.splitlines(True)[:lines])
  path.write_text(cut)
  with pytest.raises(
    cells.CellError, match=f'{path.name} .*{words}.*remove it'
  ):
    table(tmp_path, ONE, 3)
  assert path.read_text() == cut and trained == [(0,)]


def test_seeds_whose_rate_could_change_are_not_added_to(tmp_path, trained):
  table(tmp_path, echo.TRAINING, 1)
  with pytest.raises(cells.CellError, match='1 seeds, asked .* 2.*--rates'):
    table(tmp_path, echo.TRAINING, 2)
  table(tmp_path / 'one', ONE, 2)
  with pytest.raises(cells.CellError, match='2 seeds, asked for are 1'):
    table(tmp_path / 'one', ONE, 1)  # which would lose what is there
  other = dataclasses.replace(ONE, steps=20)
  with pytest.raises(cells.CellError, match='steps is 40 there and 20 here'):
    table(tmp_path / 'one', other, 3)
  assert trained == [(0,), (0, 1)]


def test_runs_apart_are_added_to_at_any_number_of_rates(tmp_path, monkeypatch):
  training = dataclasses.replace(echo.TRAINING, apart=True)
  ran, really = [], trials.serial.run

  def run(compiled, task, rate, seed, *more):
    ran.append((rate, seed))
    return really(compiled, task, rate, seed, *more)

  monkeypatch.setattr(trials.serial, 'run', run)
  (first,) = table(tmp_path, training, 1)
  two = table(tmp_path, training, 2)
  assert [seed for _, seed in ran] == [0, 0, 1, 1]
  assert two[0]['scores'] == first['scores'] and len(two) == 2
  assert set(two[0]['grid']) == {'1e-06', '0.03'}


def test_a_language_tables_times_are_of_as_many_seeds(tmp_path):
  (tmp_path / 'a.txt').write_text('To be or not to be. ' * 400)
  options = dataclasses.replace(
    language.Options(), text=str(tmp_path / '*.txt'), length=16
  )
  for apart in (False, True):
    train = dataclasses.replace(options.train, apart=apart)
    made = dataclasses.replace(options, train=train)
    asked = suite.Asked(('transformer',), rates=(0.01,))
    (cell,) = language.cells(made, asked)
    assert (cell.more is not None) == apart
