"""Needles are where and what is said, and only whole values count."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.launch import trained
from nestax.launch.data import tokenizers
from nestax.launch.evals import haystack, needle, needle_rows, running, suite
from nestax.models import language_model
from nestax.models.config import ModelConfig

BYTES = tokenizers.load('bytes')


@pytest.mark.parametrize('name', haystack.KINDS)
def test_what_is_asked_for_stands_in_the_haystack(name):
  kind = haystack.KINDS[name]
  hay, rng = haystack.make(BYTES), np.random.default_rng(0)
  depths = []
  for _ in range(20):
    row = haystack.row(hay, kind, 1024, rng)
    assert 900 < len(row.tokens) <= 1024 and row.tokens[0] == BYTES.bos
    text = BYTES.decode(row.tokens[: row.answer])
    answer = BYTES.decode(row.tokens[row.answer :])
    assert answer == ' ' + ', '.join(row.values)
    assert len(row.values) == kind.asked * kind.values
    context, question = text.split('\nWhat ')
    said = re.findall(r'magic (\w+) for ([\w-]+) is: ([\w-]+)\.', context)
    assert len(said) == kind.keys * kind.values
    keys = re.findall(r'[a-z]+-[a-z]+', question.split(' mentioned')[0])
    assert len(keys) == kind.asked
    for i, value in enumerate(row.values):
      assert (kind.value, keys[i // kind.values], value) in said
      own = row.tokens[row.span == i + 1]
      assert BYTES.decode(own) == ' ' + value
    for key in keys:  # the right order can be seen
      stand = [value for _, other, value in said if other == key]
      assert stand == [v for v in row.values if v in stand]
    noisy = 'The grass is green. The sky is blue.' in context
    assert noisy == (kind.haystack == 'noise')
    depths += [text.index(f' is: {v}.') / len(context) for v in row.values]
  assert min(depths) < 0.4 and max(depths) > 0.7


def test_any_text_is_a_haystack_and_short_rows_have_short_prompts():
  text = 'It was night. Who\nwas there? Nobody! '
  hay = haystack.make(BYTES, text, 'short')
  assert [BYTES.decode(s) for s in hay.sentences] == [
    ' It was night.',
    ' Who was there?',
    ' Nobody!',
  ]
  rng = np.random.default_rng(0)
  row = haystack.row(hay, haystack.KINDS['S-NIAH-2'], 160, rng)
  assert BYTES.decode(row.tokens).count('Nobody!') >= 1
  with pytest.raises(ValueError, match='row of 60 tokens: .*give more$'):
    haystack.row(hay, haystack.KINDS['S-NIAH-2'], 60, rng)
  long = haystack.make(BYTES, text)
  with pytest.raises(ValueError, match="row of 60 tokens: .*prompt='short'"):
    haystack.row(long, haystack.KINDS['S-NIAH-2'], 60, rng)
  with pytest.raises(ValueError, match='one of ruler, short'):
    haystack.make(BYTES, text, 'long')


@pytest.mark.parametrize('name', ['S-NIAH-2', 'MQ-NIAH'])
def test_a_tokenizer_that_puts_spaces_asks_for_the_same_bytes(name):
  putting = dataclasses.replace(
    BYTES, prefix=True, encode=lambda text: BYTES.encode(text and ' ' + text)
  )
  rows = [
    haystack.row(
      haystack.make(tokenizer),
      haystack.KINDS[name],
      1024,
      np.random.default_rng(0),
    )  # fmt: skip
    for tokenizer in (BYTES, putting)
  ]
  want, got = (row.tokens[row.answer :].tolist() for row in rows)
  assert got == want
  text = BYTES.decode(rows[1].tokens)
  assert '  ' not in text


def test_only_whole_values_count():
  row = haystack.Row(
    np.array([9, 1, 2, 7, 3, 4]), np.array([0, 1, 1, 0, 2, 2]), 1, ['a', 'b']
  )
  batch = needle_rows.batch_of([[row]] * 3, 8, 0.5)
  assert batch['tokens'].shape == (3, 7)
  np.testing.assert_array_equal(batch['weights'][0], [1, 1, 1, 1, 1, 0, 0])
  said = jnp.asarray(batch['targets']).at[1, 0].set(5).at[2, 2].set(5)
  points, rows = needle_rows.values_said(jax.nn.one_hot(said, 10), batch)
  # all; the second value alone; all, for between values it may say anything
  assert (float(points), float(rows)) == (2.5, 3)
  late = row._replace(answer=3)
  weights = needle_rows.batch_of([[late]], 8, 0.5)['weights'][0]
  np.testing.assert_array_equal(weights, [0.5, 0.5, 1, 1, 1, 0, 0])


def test_training_has_all_kinds_and_lengths():
  hay = haystack.make(BYTES, prompt='short')
  made = needle_rows.mixture(hay, 512, 0.1)(np.random.default_rng(0), 40)
  assert made['tokens'].shape == (40, 511)
  lengths = (made['weights'] > 0).sum(1)
  assert lengths.min() < 250 and lengths.max() > 450
  assert {1, 4} <= {int(span.max()) for span in made['span']}
  assert {int((row == BYTES.bos).sum()) for row in made['tokens']} == {1}


def test_a_row_may_hold_several_shorter_questions():
  hay = haystack.make(BYTES, prompt='short')
  draw = needle_rows.mixture(hay, 512, 0.1, shortest=128)
  made = draw(np.random.default_rng(0), 60)
  asked = [
    BYTES.decode(row).count('\nThe special magic') for row in made['tokens']
  ]
  assert min(asked) == 1 and 4 <= max(asked) <= 12
  assert min((made['weights'] > 0).sum(1)) > 511 - 128  # filled up
  # one row is a whole: every answer counts, and what is asked stands before it
  row = int(np.argmax(asked))
  tokens = np.r_[made['tokens'][row], made['targets'][row][-1:]]
  weights = np.r_[0, made['weights'][row]]
  parts = np.split(np.arange(512), np.flatnonzero(tokens == BYTES.bos)[1:])
  assert len(parts) == asked[row]
  for part in parts:
    answer = BYTES.decode(tokens[part][weights[part] == 1]).split(',')
    context = BYTES.decode(tokens[part][weights[part] < 1])
    assert all(f' is:{value}.' in context for value in answer)
  options = needle.Options(length=512, prompt='short', shortest=128)
  rows = needle.problem(options).train(np.random.default_rng(0), 60)
  np.testing.assert_array_equal(rows['tokens'], made['tokens'])
  with pytest.raises(
    ValueError, match='shortest=33, rows of 512.*: 64 have no.*give more$'
  ):
    needle_rows.mixture(hay, 512, 0.1, shortest=33)
  with pytest.raises(ValueError, match='a row of 256 tokens: question'):
    needle_rows.mixture(hay, 256, 0.1)(np.random.default_rng(0), 60)
  changed = dataclasses.replace(options, early='130,480', share=0.25)
  early = needle.problem(changed)
  assert early.share == 0.25 and not needle.problem(options).early
  for draw, L in zip(early.early, (130, 480), strict=True):
    short = draw(np.random.default_rng(0), 3)
    assert short['tokens'].shape == (3, L - 1)
  few = needle_rows.mixture(hay, 130, 0.1, every=False)
  few = few(np.random.default_rng(0), 9)
  for row in few['tokens']:  # only those of one number have room
    assert BYTES.decode(row).count(' numbers for ') == 2
  assert early.key['early'] == '130,480' and early.key['share'] == 0.25
  for name, wrong in (
    ('early', '100'),
    ('early', '130,513'),
    ('early', 'few'),
    ('share', 0.0),
    ('share', 1.0),
  ):
    with pytest.raises(ValueError, match=f'^{name}={wrong!r}: '):
      needle.problem(dataclasses.replace(options, **{name: wrong}))
  with pytest.raises(ValueError, match='shortest=513: 0 or up to length=512'):
    needle.problem(dataclasses.replace(options, shortest=513))
  # set one after another, as on a command line
  later = needle.Options()
  for name, value in (
    ('early', '257,1025'),
    ('shortest', 2000),
    ('length', 4097),
    ('shortest', 128),
  ):
    later = dataclasses.replace(later, **{name: value})
  later.check_lengths()


def test_a_haystack_without_text_is_refused(tmp_path):
  blank = tmp_path / 'blank.txt'
  blank.write_text(' \n')
  with pytest.raises(ValueError, match='blank.txt: the file holds no text'):
    needle.problem(needle.Options(haystack=str(blank)))


def test_reading_in_pieces_says_what_the_whole_row_says(monkeypatch):
  monkeypatch.setattr(needle, 'PIECE', 64)
  cfg = ModelConfig(family='transformer', D=16, N=1, F=16, dtype='float32')
  model = language_model.LanguageModel(cfg)
  hay = haystack.make(BYTES, prompt='short')
  row = haystack.row(
    hay, haystack.KINDS['S-NIAH-1'], 150, np.random.default_rng(0)
  )
  params = jax.jit(model.init)(
    jax.random.key(0), None, jnp.zeros((1, 1), jnp.int32)
  )['params']
  made = trained.Trained(model, params, BYTES, 0)
  whole = jax.jit(lambda t: model.apply({'params': params}, None, t)[1][0])
  assert needle._forced(made, row, 150) == 0.0
  # what the model itself says, one token after another, is right
  own = row.tokens.copy()
  for i in range(row.answer, len(own)):
    own[i] = int(whole(own[None])[i - 1].argmax())
  assert needle._forced(made, row._replace(tokens=own), 150) == 1.0
  own[-1] ^= 1
  assert needle._forced(made, row._replace(tokens=own), 150) == 0.0


def test_families_are_trained_and_paths_are_asked(tmp_path, monkeypatch):
  options = dataclasses.replace(
    needle.EVALUATION.options, lengths='512', prompt='short', rows=2
  )
  asked = suite.Asked(('transformer', str(tmp_path)), seeds=2)
  family, path = needle.cells(options, asked)
  assert family.key['config']['V'] == 272 and path.model == str(tmp_path)
  monkeypatch.setattr(needle.entrants, 'load', lambda word: _Named(word))
  monkeypatch.setattr(needle, '_forced', lambda made, row, L: 0.5)
  rows = path.run(lambda done, of: None)
  assert [row['seed'] for row in rows] == [0, 1]
  assert rows[0]['scores'] == {f'{name} 512': 50.0 for name in haystack.KINDS}
  paper = needle.EVALUATION.paper['Hope']
  assert paper['S-NIAH-1 4096'] == 100 and paper['MV-NIAH 16384'] == 11.4
  with pytest.raises(ValueError, match='of forced, generated|one of forced'):
    dataclasses.replace(options, score='said')


def test_cells_depend_on_what_their_models_are_given_alone(tmp_path):
  asked = suite.Asked(('transformer', str(tmp_path)), seeds=2)
  options = dataclasses.replace(
    needle.EVALUATION.options, length=512, lengths='512', prompt='short'
  )
  keys = [cell.key for cell in needle.cells(options, asked)]
  trained = {'length': 480, 'shortest': 128, 'early': '256', 'share': 0.25}
  for changed, (family, path) in (
    *(({k: x}, (False, True)) for k, x in trained.items()),
    ({'background': 0.5}, (False, True)),
    ({'rows': 3}, (True, False)),
    ({'score': 'generated'}, (True, False)),
    ({'lengths': '480'}, (False, False)),
    ({'prompt': 'ruler', 'length': 1024}, (False, False)),
  ):
    other = dataclasses.replace(options, **changed)
    same = [a.key == b for a, b in zip(needle.cells(other, asked), keys)]
    assert same == [family, path], changed


@pytest.mark.parametrize('prompt', haystack.PROMPTS)
def test_no_question_takes_more_tokens_than_are_said_to_be_enough(prompt):
  hay, rng = haystack.make(BYTES, prompt=prompt), np.random.default_rng(0)
  for name, most in haystack.most(hay).items():
    kind = haystack.KINDS[name]
    drawn = [haystack.taken(hay, kind, rng) for _ in range(500)]
    assert most - 32 < max(drawn) <= most, name


@pytest.mark.parametrize(
  'trained,changed,words',
  [
    (
      True,
      {'lengths': '512,256'},
      'needle.lengths=512,256: rows of 256 tokens .* up to MK-NIAH-1 [0-9]+, '
      'MQ-NIAH 408, MV-NIAH [0-9]+; give at least 408$',
    ),
    (False, {'lengths': '256'}, 'needle.lengths=256: '),
    (
      False,
      {'length': 407, 'shortest': 128, 'lengths': '256'},
      'needle.length=407: rows of 407 .* up to MQ-NIAH 408; ',
    ),
    (
      False,
      {'prompt': 'ruler', 'lengths': '512'},
      'at least 7[0-9]+, or 408 with --set=needle.prompt=short$',
    ),
  ],
)
def test_rows_too_short_are_refused_before_anything_is_begun(
  trained, changed, words, tmp_path, monkeypatch, capfd
):
  monkeypatch.setattr(needle.entrants, 'tokenizer', lambda word: BYTES)
  run = tmp_path / 'run'
  run.mkdir()
  options = dataclasses.replace(
    needle.EVALUATION.options, **{'lengths': '512', 'prompt': 'short'} | changed
  )
  asked = suite.Asked(
    (str(run) if trained else 'transformer',), workdir=tmp_path
  )
  with pytest.raises(ValueError, match=words):
    running.run([needle.EVALUATION._replace(options=options)], asked)
  assert 'begun' not in capfd.readouterr().err


def test_as_many_tokens_as_are_said_to_be_enough_are_taken():
  options = needle.Options(length=408, lengths='408', prompt='short')
  for cell in needle.cells(options, suite.Asked(('transformer',))):
    cell.check()
  problem, rng = needle.problem(options), np.random.default_rng(0)
  assert problem.train(rng, 200)['tokens'].shape == (200, 407)
  for draw in problem.tests.values():
    assert draw(rng, 50)['tokens'].shape == (50, 407)


class _Named:
  tokenizer = BYTES

  def __init__(self, word):
    self.word = word
