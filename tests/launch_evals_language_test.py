"""Families are trained on one text, with one number of parameters."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from nestax.launch.evals import entrants, language, suite, trials

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
  ),
)


@pytest.fixture
def options(tmp_path):
  for name, letters in (('one', 'abcd'), ('two', 'éfgh')):
    (tmp_path / f'{name}.txt').write_text(letters * 150)
  return dataclasses.replace(OPTIONS, text=str(tmp_path / '*.txt'))


def test_the_end_of_every_file_is_held_out(options):
  train, test, name = language.read(options)
  bos, eos = 256, 257
  for part, count in ((train, 570), (test, 30)):
    one, two = (f'{"abcd" * 150}', f'{"éfgh" * 150}')
    pieces = (one[:570], two[:570]) if count == 570 else (one[570:], two[570:])
    ids = [[bos, *piece.encode(), eos] for piece in pieces]
    np.testing.assert_array_equal(part[0], np.concatenate(ids))
    assert part[1].sum() == sum(len(piece.encode()) for piece in pieces)
  other = dataclasses.replace(options, text=options.text.replace('*', 'one'))
  assert language.read(other)[2] != name
  with pytest.raises(ValueError, match='32 tokens are held out, one in 20'):
    language.read(dataclasses.replace(other, length=32))
  with pytest.raises(ValueError, match='language.text is not given'):
    language.read(OPTIONS)


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


def test_less_is_better(options):
  asked = suite.Asked(('transformer',), seeds=2)
  (cell,) = language.cells(options, asked)
  assert cell.key['training']['examples'] == 480 and cell.key['length'] == 8
  rows = cell.run(lambda done, of: None)
  for row in rows:
    assert row['rate'] == 3e-2 and row['grid']['1e-06'] < row['grid']['0.03']
    # 8 equally likely first letters, then nothing but the file's next one
    assert 0.3 < row['scores']['bits a byte'] < 4
    assert row['valid'] == pytest.approx(-row['scores']['bits a byte'], rel=0.6)
    assert row['scores']['thousand tokens/s'] > 0
