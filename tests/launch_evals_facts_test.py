"""Days of facts: nobody is told apart by what is common; all can be read."""

import itertools

import pytest

from nestax.launch.evals import facts


def test_the_same_seed_gives_the_same_days_and_no_name_comes_twice():
  days = facts.days(3, 5)
  assert days == facts.days(3, 5) and days != facts.days(4, 5)
  assert days[:2] == facts.days(3, 2)  # a longer life begins alike
  names = {fact.who for day in days for fact in day}
  words = [word for name in names for word in name.split()]
  assert len(names) == 5 * facts.PEOPLE and len(set(words)) == len(words)


@pytest.mark.parametrize('people', [3, 8])
def test_every_value_is_one_persons_so_that_chance_is_known(people):
  (day,) = facts.days(0, 1, people)
  assert len(day) == people * len(facts.RELATIONS)
  for relation in facts.RELATIONS:
    own = [fact for fact in day if fact.relation == relation]
    assert len({fact.what for fact in own}) == people
    for fact in own:
      named = relation == 'friend'  # nobody is their own friend
      assert len(set(fact.candidates)) == people - named
      assert fact.candidates[0] == f' {fact.what}'
      assert f' {fact.who}' not in fact.candidates


def test_a_day_states_every_fact_in_every_pass_in_another_wording():
  (day,) = facts.days(0, 1, 3)
  lines = facts.text(day, 8, seed=1).splitlines()
  for fact in day:
    said = {fact.statement(i) for i in range(8)}
    assert len(said) == 8 and said <= set(lines)
  assert len(lines) == 8 * len(day)
  first, second = lines[: len(day)], lines[len(day) : 2 * len(day)]
  assert not set(first) & set(second)
  assert facts.text(day, 8, seed=2) != facts.text(day, 8, seed=1)


def test_questions_are_in_words_that_no_day_has():
  for relation in facts.RELATIONS.values():
    for question, statement in itertools.product(
      relation.questions, relation.statements
    ):
      asked = question.removeprefix('Question: ').split('{who}')
      assert not statement.startswith(asked[0] + '{who}' + asked[1])


def test_the_tokenizer_knows_all_words_and_no_others():
  tokenizer = facts.tokenizer()
  for day in facts.days(0, 2):
    text = facts.text(day, 8, 0)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    for fact in day:
      for question, answer in itertools.product(
        fact.questions, fact.candidates
      ):
        ids = tokenizer.encode(question) + tokenizer.encode(answer)
        assert tokenizer.decode(ids) == question + answer
        assert ids == tokenizer.encode(question + answer)
  with pytest.raises(ValueError, match='words of facts only'):
    tokenizer.encode('Xylophone')


@pytest.mark.parametrize(
  'values, words',
  [
    ({'people': 2}, 'people=2: from 3 to 8'),
    ({'relations': ('age',)}, 'relations age: known are city'),
  ],
)
def test_impossible_days_are_refused_in_words(values, words):
  with pytest.raises(ValueError, match=words):
    facts.days(0, 1, **values)
