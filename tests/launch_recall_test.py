"""Recall: right is what is preferred, chance is chance."""

import jax.numpy as jnp
import numpy as np

from nestax.launch import recall
from nestax.launch.evals import facts
from nestax.sleep import reader as readers

TOKENIZER = facts.tokenizer()
V = TOKENIZER.vocab_size


def by_heart(right_V):
  """A model whose next-token logits are the same whatever it has read."""

  def read(params, state, tokens_BxL, length_B=None):
    del length_B
    shape = (*tokens_BxL.shape, V)
    return state, jnp.broadcast_to(params[None, None], shape)

  reader = readers.Reader(lambda context, rows, length: None, read)
  return reader, right_V


def test_questions_have_their_answers_in_place():
  (day,) = facts.days(0, 1, 4)
  asked = recall.ask(TOKENIZER, facts.asked(day))
  assert asked.question_N[-1] + 1 == 3 * len(day)
  assert asked.right_N.sum() == 3 * len(day)
  assert np.isclose(asked.chance, (4 / 4 + 1 / 3) / 5)
  tokens, start, length = asked.rows
  row = int(np.flatnonzero(asked.right_N)[0])
  said = TOKENIZER.decode(tokens[row, start[row] : length[row]])
  assert said.strip() == day[0].what
  assert tokens[row, 0] == TOKENIZER.bos
  assert (tokens[row, length[row] :] == TOKENIZER.pad).all()


def test_the_preferred_answer_counts_whatever_the_batches():
  (day,) = facts.days(0, 1, 4, ('city', 'pet'))
  # likes one city and nothing else: it is one of four
  liked = TOKENIZER.encode(f' {day[0].what}')[0]
  reader, params = by_heart(jnp.zeros(V).at[liked].set(5.0))
  asked = recall.ask(TOKENIZER, facts.asked(day))
  for rows in (5, 64):
    right = recall.right(reader, params, None, asked, rows)
    want = [fact.what == day[0].what for fact in day for _ in range(3)]
    np.testing.assert_array_equal(right, want)


def test_a_tie_or_a_number_that_is_none_is_no_knowledge():
  (day,) = facts.days(0, 1, 4, ('city',))
  asked = recall.ask(TOKENIZER, facts.asked(day))
  for params in (jnp.zeros(V), jnp.full(V, jnp.nan)):
    reader, params = by_heart(params)
    assert not recall.right(reader, params, None, asked).any()


def test_without_wrong_answers_it_has_to_be_what_the_model_says_itself():
  words = TOKENIZER.encode(' Paris') + TOKENIZER.encode(' Rome')
  reader, params = by_heart(jnp.zeros(V).at[words[0]].set(5.0))
  asked = recall.ask(
    TOKENIZER,
    [
      ('In', [' Paris']),
      ('In', [' Rome']),
      ('In', [' Paris Rome']),  # all of it
      ('In', [' Rome', ' London', ' Berlin']),  # a tie, and chance of a third
      ('In', [' Paris', ' Rome']),
    ],
  ).filled(24, TOKENIZER.pad)
  assert np.isclose(asked.chance, (1 / 3 + 1 / 2) / 5)
  assert asked.rows.tokens_BxL.shape == (8, 24)
  right = recall.right(reader, params, None, asked, 3)
  assert right.tolist() == [True, False, False, False, True]
  # of logits that are no numbers the first is the greatest
  first = recall.ask(TOKENIZER, [('In', [TOKENIZER.decode([0])])])
  assert not recall.right(*by_heart(jnp.full(V, jnp.nan)), None, first).any()
  assert recall.right(*by_heart(jnp.zeros(V)), None, first).all()
