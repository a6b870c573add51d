"""Families are trained on one text, with one number of parameters."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from nestax.launch.evals import (
  entrants,
  language,
  problems,
  serial,
  suite,
  trials,
)

OPTIONS = dataclasses.replace(
  language.Options(),
  length=8,
  train=trials.Training(
    D=16,
    N=1,
    H=1,
    steps=60,
    batch=8,
    tests=12,
    rates=(1e-6, 3e-2),
    evaluations=2,
    apart=True,
  ),
)


@pytest.fixture
def options(tmp_path):
  for name, letters in (('one', 'abcd'), ('two', 'éfgh')):
    (tmp_path / f'{name}.txt').write_text(letters * 150)
  return dataclasses.replace(OPTIONS, text=str(tmp_path / '*.txt'))


def test_the_end_of_every_file_is_held_out(options):
  text, name = language.read(options)
  bos, eos = 256, 257
  ends = {'train': (0, 570), 'valid': (570, 585), 'test': (585, 600)}
  for part, (start, stop) in ends.items():
    pieces = (letters * 150 for letters in ('abcd', 'éfgh'))
    ids = [[bos, *piece[start:stop].encode(), eos] for piece in pieces]
    ids = np.concatenate(ids)
    np.testing.assert_array_equal(getattr(text, part)[0], ids)
    assert getattr(text, part)[1].sum() == len(ids) - 4
  other = dataclasses.replace(options, text=options.text.replace('*', 'one'))
  assert language.read(other)[1] != name
  with pytest.raises(ValueError, match='17 tokens to validate or test on, one'):
    language.read(dataclasses.replace(other, length=17))
  with pytest.raises(ValueError, match='language.text is not given'):
    language.read(OPTIONS)


def test_the_rate_is_picked_on_other_text_than_what_is_tested(tmp_path):
  # the test's letters are those of no other part, and the other way round
  (tmp_path / 'one.txt').write_text('ab' * 190 + 'cd' * 5 + 'ef' * 5)
  options = dataclasses.replace(OPTIONS, text=str(tmp_path / 'one.txt'))
  problem = language.problem(options, ('transformer',))
  read = []
  for draws in (problem.valid, problem.tests):
    rows = [draw(np.random.default_rng(0), 12) for draw in draws.values()]
    read.append({int(x) for r in rows for x in r['targets'].ravel()} - {257})
  assert read == [{*b'cd'}, {*b'ef'}]
  data = problems.data(problem, options.train, 1)
  for split, letters in (('valid', 'cd'), ('tests', 'ef')):
    (rows,) = data[split].values()
    counted = rows['targets'][rows['weights'] > 0]
    assert {*counted.tolist()} - {257} == {*letters.encode()}


def test_windows_have_their_next_tokens_and_bytes():
  text = np.stack([np.arange(30), np.arange(30) % 3])
  rows = language.apart(text, 7)(np.random.default_rng(0), 9)
  assert sorted(rows['tokens'][:, 0]) == [0, 7, 14, 21]
  np.testing.assert_array_equal(rows['targets'], rows['tokens'] + 1)
  np.testing.assert_array_equal(rows['bytes'], rows['targets'] % 3)
  rows = language.anywhere(text, 7)(np.random.default_rng(0), 200)
  assert set(rows['tokens'][:, 0]) == set(range(23))
  rows = {name: x.astype(np.int32) for name, x in rows.items()}
  logits = jnp.zeros((200, 7, 32))
  spent, size = language.bits(logits, rows)
  assert spent == pytest.approx(5 * 200 * 7) and size == rows['bytes'].sum()


def test_all_families_have_as_many_parameters():
  words = 'hope', 'titans', 'gated_deltanet', 'hope_attention:cms.blocks=all'
  options = language.Options()
  base = options.train.base(272)
  like = language.parameters(entrants.config('transformer', base))
  own = language.own(options, 272, words)
  for word in words:
    cfg = entrants.config(word, base, own)
    assert language.parameters(cfg) == pytest.approx(like, rel=0.01)
  assert own['titans']['memory']['depth_mem'] == 2
  loose = language.own(dataclasses.replace(options, match=False), 272, words)
  assert loose['hope'] == {} and 'F' not in loose['titans']
  narrow = dataclasses.replace(options.train, D=32, F=32, H=1)
  with pytest.raises(ValueError, match='mixers have more parameters'):
    narrow = dataclasses.replace(options, train=narrow)
    language.own(narrow, 272, ('hope',))


def test_what_takes_other_time_is_another_cell(options):
  words = 'transformer', 'transformer:remat=full', 'transformer:unroll=2'
  cells = list(language.cells(options, suite.Asked(words)))
  assert tuple(cell.model for cell in cells) == words
  keys = [cell.key['config'] for cell in cells]
  assert all(x != y for x, y in itertools.combinations(keys, 2))


def test_less_is_better(options, tmp_path, monkeypatch):
  training = dataclasses.replace(options.train, trial=30)
  options = dataclasses.replace(options, train=training)
  asked = suite.Asked(('transformer',), seeds=2, workdir=tmp_path / 'w')
  (cell,) = language.cells(options, asked)
  assert cell.key['training']['examples'] == 480 and cell.key['length'] == 8
  rows = cell.run(lambda done, of: None)
  for row in rows:
    assert row['rate'] == 3e-2 and row['grid']['1e-06'] < row['grid']['0.03']
    # 8 equally likely first letters, then nothing but the file's next one
    assert 0.3 < row['scores']['bits a byte'] < 4
    assert row['valid'] == pytest.approx(-row['scores']['bits a byte'], rel=0.6)
    # of its own steps, not of all runs in the same time
    speed = row['scores']['thousand tokens/s']
    assert speed == pytest.approx(8 * 8 / row['step_ms'])
  (folder,) = (tmp_path / 'w' / 'runs').iterdir()
  names = [path.stem for path in folder.iterdir()]
  assert sorted(names) == ['0.03_0_30', '0.03_0_60', '0.03_1_60', '1e-06_0_30']
  # one seed of the same is what is there
  one = dataclasses.replace(asked, seeds=1, rates=(3e-2,))
  (cell,) = language.cells(options, one)
  monkeypatch.setattr(serial, 'programs', None)  # nothing is left to compile
  (again,) = cell.run(lambda done, of: None)
  assert again['scores'] == rows[0]['scores'] and not again['edge']


@pytest.mark.parametrize(
  'changes,said',
  [
    ({'trial': 60}, 'trial=60: fewer than steps=60'),
    ({'trial': 20}, 'trial=20: a multiple of 30'),
    ({'trial': 30, 'apart': False}, 'with apart=true'),
  ],
)
def test_trials_that_do_not_fit_are_refused(options, changes, said):
  training = dataclasses.replace(options.train, **changes)
  options = dataclasses.replace(options, train=training)
  with pytest.raises(ValueError, match=said):
    list(language.cells(options, suite.Asked(('transformer',))))


@pytest.mark.parametrize('ms, want', [(2.0, 32.0), (None, None)])
def test_what_was_not_timed_has_no_speed(ms, want):
  (row,) = language._timed(
    lambda: [{'step_ms': ms, 'scores': {'bits a byte': 1.0}}], 64
  )
  assert row['scores'].get('thousand tokens/s') == want
  assert len(row['scores']) == (1 if want is None else 2)
