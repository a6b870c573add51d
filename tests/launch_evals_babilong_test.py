"""Stories are hidden as the benchmark says, and read in constant memory."""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest
import sleep_cases as cases

from nestax.launch import trained
from nestax.launch.data import tokenizers
from nestax.launch.evals import babi, babilong, contexts, learners, suite
from nestax.models import language_model

STORY = """1 Mary went home.
2 John took the milk.
3 Where is Mary? \thome\t1
4 Mary left.
5 Who has the milk? \tJohn\t2 4
1 Ann sat down.
2 Where is Ann?\tchair\t1
"""
BOOK = 'It was a dark night. "Who goes there?" she said. No! The end of it all.'
BYTES = tokenizers.load('bytes')
ROOT = pathlib.Path(__file__).parents[1]
SHARED = pathlib.Path(
  os.environ.get('NESTAX_DATA', ROOT.parent / 'shared/data')
)


@pytest.fixture
def story(tmp_path):
  path = tmp_path / 'qa7_test.txt'
  path.write_text(STORY)
  return path


def test_a_question_knows_what_was_told_before_it(story):
  first = ('Mary went home.', 'John took the milk.')
  assert babi.read(story) == [
    babi.Sample(first, 'Where is Mary?', 'home'),
    babi.Sample((*first, 'Mary left.'), 'Who has the milk?', 'John'),
    babi.Sample(('Ann sat down.',), 'Where is Ann?', 'chair'),
  ]


@pytest.mark.parametrize(
  'text, words',
  [
    ('Mary went home.', "line 1: 'Mary went home.'; bAbI lines"),
    ('1 Mary went.\n2 Where?\t\t1', 'line 2: a question without an answer'),
    ('1 Mary went home.\n', 'no questions'),
  ],
)
def test_other_files_are_refused_in_words(tmp_path, text, words):
  path = tmp_path / 'x.txt'
  path.write_text(text)
  with pytest.raises(ValueError, match=words):
    babi.read(path)
  with pytest.raises(FileNotFoundError, match=r'books=.*nothing'):
    babi.find(str(tmp_path / 'nothing*'), 'books')


def test_prose_is_split_at_its_marks():
  assert babi.sentences('  A b.  "C d?" E\nf! G 3.5 h') == [
    'A b.',
    '"C d?"',
    'E f!',
    'G 3.5 h',
  ]


def test_facts_keep_their_order_and_the_book_its_sentences(story):
  sample, book = babi.read(story)[1], babi.Book([BOOK], BYTES)
  places = set()
  for seed in range(20):
    rng = np.random.default_rng(seed)
    ids = babi.hide(BYTES, sample, book, 200, rng)
    assert len(ids) == 200 and ids[0] == BYTES.bos
    text = BYTES.decode(ids.tolist())
    at = [text.index(fact) for fact in sample.facts]
    assert at == sorted(at)
    places.add(at[0])
    for fact in sample.facts:
      text = text.replace(f' {fact}', '', 1)
    # what is left is the book from some sentence on, round and round
    whole = ' '.join(s for s in babi.sentences(BOOK) if s != 'No!')
    assert text.strip() in ' '.join([whole] * 6)
  assert len(places) > 5
  with pytest.raises(ValueError, match='30 tokens: the facts of'):
    babi.hide(BYTES, sample, book, 30, np.random.default_rng(0))
  with pytest.raises(ValueError, match='no sentence of 10'):
    babi.Book(['No! Yes.'], BYTES)


def test_a_model_that_wants_no_bos_is_given_none():
  plain = dataclasses.replace(BYTES, adds_bos=False)
  sample = babi.Sample(('Mary is here.',), 'Where is Mary?', 'here')
  ids = babi.hide(
    plain, sample, babi.Book([BOOK], plain), 200, np.random.default_rng(0)
  )
  assert len(ids) == 200 and BYTES.bos not in ids


def test_an_answer_is_the_only_label_said():
  sample = babi.Sample((), 'Where was Mary before the garden?', 'kitchen')
  labels = ['garden', 'kitchen', 'office']
  for said, want in (
    (' kitchen', True),
    ('The Kitchen. Not the office', True),
    ('kitchen, not garden', True),  # the question speaks of the garden
    ('kitchen or office', False),
    ('office', False),
    ('', False),
  ):
    assert babi.right(sample, said, labels) == want


class Knows:
  """Stands for a model: likes one label, says another."""

  def __init__(self, liked, said):
    self.liked, self.said = liked, said

  def __call__(self, made, begun, sample, labels, most):
    assert labels == ['John', 'chair', 'home']
    return self.liked, self.said


@pytest.fixture
def made():
  cfg = cases.config('transformer')
  cfg = dataclasses.replace(cfg, V=259)
  return trained.Trained(
    language_model.LanguageModel(cfg), cases.params_of(cfg), BYTES, 0, 'bytes'
  )


def test_cells_score_what_is_chosen_and_what_is_written(
  story, tmp_path, monkeypatch, made
):
  (tmp_path / 'book.txt').write_text(BOOK)
  monkeypatch.setattr(learners, 'load', lambda word: made)
  babilong._model.cache_clear()
  monkeypatch.setattr(babilong, 'answer', Knows('John', 'home'))
  options = babilong.Options(
    str(story), str(tmp_path / 'b*.txt'), '64+96', piece=32, rows=2
  )
  asked = suite.Asked(('m', 'm:levels=off'), seeds=2)
  found = list(babilong.cells(options, asked))
  assert [(c.task, c.model) for c in found[:3]] == [
    ('qa7 64', 'm'),
    ('qa7 96', 'm'),
    ('qa7 64', 'm:levels=off'),
  ]
  said = []
  rows = found[0].run(lambda done, of: said.append((done, of)))
  third = pytest.approx(100 / 3)
  assert [row['scores'] for row in rows] == [
    {'chosen': third, 'written': third}
  ] * 2
  assert said == [(2, 6), (3, 6), (5, 6), (6, 6)]
  assert found[0].key != found[1].key
  json.dumps(found[0].key)


def test_pieces_leave_what_one_reading_would_and_are_no_larger(made):
  cfg, params = made.model.cfg, made.params
  ids = np.array(cases.tokens(2, 49))
  one = contexts.read(cfg, params, ids, window=8, piece=49)
  two = contexts.read(cfg, params, ids, window=8, piece=16)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two
  )
  size = sum(x.size for x in jax.tree.leaves(one))
  read = []
  more = contexts.read(cfg, params, ids, 8, 16, two, read.append)
  assert read == [16, 16, 16, 1]
  assert sum(x.size for x in jax.tree.leaves(more)) == size
  sample = babi.Sample((), 'Who?', 'a')
  begun = contexts.row(more, 1)
  picked, text = babilong.answer(made, begun, sample, ['a', 'bb'], 3)
  assert picked in ('a', 'bb') and len(text) <= 3


def test_texts_to_train_on_are_written(story, tmp_path):
  (tmp_path / 'book.txt').write_text(BOOK)
  samples, book = babi.read(story), babi.Book([BOOK], BYTES)
  texts = list(babi.texts(BYTES, samples, book, 128, 4, 0))
  assert len(texts) == 4
  assert texts[0].endswith('\nQuestion: Where is Mary?\nAnswer: home.\n')
  assert 'Mary went home. ' in texts[3] and texts[0] != texts[3]


@pytest.mark.skipif(not SHARED.exists(), reason='the data are not here')
def test_the_real_files_are_read():
  paths = sorted((SHARED / 'babi_v1_2' / 'en').glob('qa*_test.txt'))
  found = {path.stem.split('_')[0]: babi.read(path) for path in paths}
  assert len(found) == 20 and all(len(x) >= 900 for x in found.values())
  assert {s.answer for s in found['qa1']} == {
    *'bathroom bedroom garden hallway kitchen office'.split()
  }
