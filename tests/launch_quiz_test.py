"""Whose levels and whose slots know an answer: a model that shows its parts."""

import jax
import jax.numpy as jnp
import nights_cases as cases
import numpy as np

from nestax.launch import quiz, recall
from nestax.launch.questions import Question
from nestax.models import model_state
from nestax.sleep import grow
from nestax.sleep import reader as readers
from nestax.sleep.replay import Piece

CFG = cases.made().model.cfg
LETTERS = b'wxyz'  # level 0, level 1, slots of level 0, slots of level 1


def read(params, state, tokens_BxL, length_B=None):
  """Says w, x, y or z as far as those parts of the model hold something."""
  del length_B
  levels = [jnp.abs(x.down_FxD).sum() for x in state]
  slots = [grow.slots(CFG, params, k).active_S.sum() for k in range(2)]
  logits_V = jnp.zeros(CFG.V)
  for letter, value in zip(LETTERS, [*levels, *slots]):
    logits_V = logits_V.at[letter].set(jnp.where(value > 0, 1.0, -1.0))
  return state, jnp.broadcast_to(logits_V, (*tokens_BxL.shape, CFG.V))


READER = readers.Reader(lambda context, rows, length: context, read)


def ask(letter, owner, day):
  return Question('is it\n', letter, ('a',), day, owner)


QUIZ = quiz.parts(
  cases.made().tokenizer,
  [ask(letter, 'bob', day) for day in ('1', '2') for letter in 'wxyz']
  + [ask('w', 'ann', '1'), ask('z', 'ann', '1'), ask('w', 'gone', '1')],
)


def test_all_parts_have_rows_of_one_length():
  tokenizer = cases.made().tokenizer
  long = Question('is it so or is it so\n', 'w', ('and so on',), '3', 'bob')
  found = quiz.parts(tokenizer, [ask('w', 'ann', '1'), long])
  short, whole = (part.sheet for part in found)
  assert short.length == whole.length == 32
  for sheet, words in ((short, 'is it\nw'), (whole, 'is it so or is it so\nw')):
    tokens, _, size = sheet.rows
    row = [*recall.begin(tokenizer), *tokenizer.encode(words)]
    assert tokens[0, : size[0]].tolist() == row
    assert (tokens[0, size[0] :] == tokenizer.pad).all()


def who(params):
  """Only bob's levels have written."""
  state = model_state.init_state(CFG, 3, 8)
  levels = [
    level._replace(
      delta=jax.tree.map(lambda x: x.at[:, 1].add(1.0), level.delta)
    )
    for level in state.levels.levels
  ]
  state = state._replace(levels=state.levels._replace(levels=tuple(levels)))
  return quiz.Who(CFG, READER, params, state, ('ann', 'bob', ''), told.append)


told = []
GROWN = grow.grow(CFG, cases.made().params, 1)[0]
BOTH = grow.grow(CFG, GROWN, 0)[0]


def test_at_dusk_levels_are_asked_together_alone_and_reset():
  told.clear()
  found = quiz.dusk(who(GROWN), QUIZ, {('bob', '1')})
  # bob knows w and x by levels and z by slots; ann z by the same slots
  assert found['dusk'] == ({'1': 4 / 6, '2': 3 / 4}, 3 / 4)
  assert found['slow'] == ({'1': 2 / 6, '2': 1 / 4}, 1 / 4)
  for alone in found['alone']:
    assert alone == ({'1': 3 / 6, '2': 2 / 4}, 2 / 4)
  assert sum(told) == quiz.dusk_asks(2) * 10  # nobody asks who is gone


def test_each_level_alone_is_that_level():
  only = [x for x in 'wxyz']
  quizzes = {
    x: quiz.parts(cases.made().tokenizer, [ask(x, 'bob', '1')]) for x in only
  }
  by_level = [
    [quiz.dusk(who(GROWN), quizzes[x], ())['alone'][k].right['1'] for x in only]
    for k in range(2)
  ]
  assert by_level == [[1, 0, 0, 1], [0, 1, 0, 1]]


def test_in_the_morning_slots_are_asked_with_and_without():
  about = {('bob', '2'), ('ann', '1')}
  morning = quiz.morning(who(BOTH), QUIZ, about)
  assert morning == ({'1': 3 / 6, '2': 2 / 4}, 3 / 6)
  off_0, off_1 = quiz.without(who(BOTH), QUIZ, about, [1, 1])
  assert off_0 == ({'1': 2 / 6, '2': 1 / 4}, 2 / 6)
  assert off_1 == ({'1': 1 / 6, '2': 1 / 4}, 1 / 6)
  assert quiz.without(who(GROWN), QUIZ, about, [0, 1])[0] is None


def test_the_numbers_of_a_night_are_about_what_was_slept_on():
  pieces = [Piece('bob', (1,), 0.0, 'day 2'), Piece('ann', (1,), 0.0, 'day 1')]
  about = quiz.about(x for x in pieces if x.owner == 'bob')
  assert about == {('bob', '2')}
  found = quiz.dusk(who(GROWN), QUIZ, about)
  found['morning'] = quiz.morning(who(GROWN), QUIZ, about)
  found['without'] = quiz.without(who(GROWN), QUIZ, about, [0, 1])
  got = quiz.numbers(found, QUIZ, about)
  want = {'asked': 4, 'chance': 0.5, 'slow': 0.25, 'dusk': 0.75}
  want |= {'morning': 0.25, 'alone_0': 0.5, 'alone_1': 0.5, 'without_1': 0.0}
  assert got == {f'recall_{name}': value for name, value in want.items()}
  assert quiz.numbers(found, QUIZ, {('ann', '2')}) == {}
  row = quiz.row(found, QUIZ)
  assert row['asked'] == {'1': 7, '2': 4} and row['dusk']['2'] == 0.75
  assert row['without'] == [None, {'1': 0.0, '2': 0.0}]


def test_answers_go_on_from_their_questions():
  began, went_on = [], []
  plain = cases.made().tokenizer

  class Noting:
    bos, pad, adds_bos = plain.bos, plain.pad, True

    def encode(self, text):
      began.append(text)
      return plain.encode(text)

    def encode_after(self, text):
      went_on.append(text)
      return plain.encode(text)

  asked = [Question('In', 'Rome', ('Oslo',)), Question('So', 'what')]
  parts = quiz.parts(Noting(), asked)
  assert {'In', 'So'} == set(began)
  assert {' Rome', ' Oslo', ' what'} == set(went_on)
  (part,) = parts
  assert part.sheet.count == 2 and np.isclose(part.sheet.chance, 0.25)


def test_slots_of_ones_own_are_asked_of_their_owner():
  made = cases.made(scope='owner')
  cfg = made.model.cfg
  state = model_state.init_state(cfg, 2, 8)
  owned = [
    slots._replace(active_S=slots.active_S.at[:, 1].set(float(i)))
    for i, slots in enumerate(state.owned)
  ]
  state = state._replace(owned=tuple(owned))
  asking = quiz.Who(cfg, READER, made.params, state, ('ann', 'bob'))
  put = quiz.parts(
    made.tokenizer, [ask('z', name, name) for name in ('ann', 'bob')]
  )
  assert quiz.morning(asking, put).right == {'ann': 0.0, 'bob': 1.0}
  (_, off) = quiz.without(asking, put, (), [0, 1])
  assert off.right == {'ann': 0.0, 'bob': 0.0}
