"""Files of questions: what they say, and what is wrong with them in words."""

import json

import numpy as np
import pytest

from nestax.launch import questions
from nestax.launch.days import Day

IDS = np.zeros(3, np.int32)
DAYS = (Day('mon', {'ann': IDS, 'bob': IDS}), Day('tue', {'ann': IDS}))
ONE = (Day('mon', {'reader': IDS}), Day('tue', {'reader': IDS}))


def load(tmp_path, days, *lines):
  path = tmp_path / 'q.jsonl'
  words = [x if isinstance(x, str) else json.dumps(x) for x in lines]
  path.write_text('\n'.join(words) + '\n')
  return questions.load(str(path), days)


def test_questions_are_put_to_who_has_read_of_them(tmp_path):
  asked = {'question': 'Where is Ann?', 'answer': 'Rome'}
  one, two, three = load(
    tmp_path,
    DAYS,
    asked | {'day': 'tue', 'choices': ['Oslo', ' Paris']},
    '',
    {'question': 'She is in', 'answer': 'Rome', 'owner': 'bob'},
    '{"question": "Where?\\n", "answer": "\u2028Rome", "owner": "ann", '
    '"day": "mon"}',
  )
  assert (one.owner, two.owner, three.owner) == ('ann', 'bob', 'ann')
  assert (one.day, two.day, three.day) == ('tue', '', 'mon')
  assert one.prompt == 'Question: Where is Ann?\nAnswer:'
  assert one.answers == (' Rome', ' Oslo', ' Paris')
  assert (two.prompt, two.answers) == ('She is in', (' Rome',))
  assert (three.prompt, three.answers) == ('Where?\n', ('\u2028Rome',))
  assert load(tmp_path, ONE, asked)[0].owner == 'reader'


GOOD = {'question': 'Where?', 'answer': 'Rome', 'owner': 'ann'}


@pytest.mark.parametrize(
  'line, said',
  [
    ('{"question": "Where?",', 'not JSON .*: a question is one line'),
    ('["Where?", "Rome"]', 'is no object: {"question"'),
    (GOOD | {'awnser': 'Oslo'}, "no key 'awnser'; there are question, answer"),
    ({'question': 'Where?'}, "no 'answer': every line has a question and an"),
    (GOOD | {'choices': 'Oslo'}, "choices='Oslo': a list of wrong answers"),
    (GOOD | {'choices': [7]}, 'choices: 7 is no text in quotation marks'),
    (GOOD | {'answer': ' '}, "answer: ' ' is no text"),
    (GOOD | {'choices': ['Oslo', 'Rome']}, "'Rome' is among the answers twice"),
    (
      GOOD | {'choices': ['Oslo', ' Oslo']},
      "'Oslo' is among the answers twice",
    ),
    (GOOD | {'day': 'sun'}, "no day 'sun' is read; there are mon, tue"),
    (GOOD | {'owner': 'eve'}, "no owner 'eve' reads; there are ann, bob"),
    (GOOD | {'owner': 'bob', 'day': 'tue'}, "no owner 'bob' reads on day tue"),
    ({'question': 'x', 'answer': 'y'}, 'Give "owner": one of ann, bob'),
  ],
  ids=lambda x: x if isinstance(x, str) and len(x) > 24 else '',
)
def test_a_line_that_is_no_question_is_named_with_what_would_be(
  tmp_path, line, said
):
  with pytest.raises(ValueError, match=f'q.jsonl, line 3: .*{said}'):
    load(tmp_path, DAYS, GOOD, '', line)


def test_a_file_without_questions_is_refused_with_an_example(tmp_path):
  with pytest.raises(ValueError, match='no question in it; give lines such as'):
    load(tmp_path, DAYS, '', '  ')
