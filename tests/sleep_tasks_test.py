"""Facts that are nowhere else, and grids of the user's ARC files."""

import json
import os
import pathlib

import pytest

from nestax.sleep import tasks
from nestax.sleep.task import TaskError

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(os.environ.get('NESTAX_DATA', ROOT.parent / 'shared/data'))


def encode(text):
  return list(text.encode())


def decode(tokens):
  return bytes(t for t in tokens if t < 256).decode()


def test_a_seed_gives_the_same_facts_and_another_seed_others():
  one = tasks.facts(0, 5)
  assert one == tasks.facts(0, 5)
  names = {fact.who for fact in one}
  assert len(names) == 5
  assert not names & {fact.who for fact in tasks.facts(1, 5)}
  # the same on every machine and Python: it does not hang on hash()
  assert one[0].who == 'Klorbopai Gaigaiba'


def test_questions_ask_in_other_words_and_do_not_give_the_answer_away():
  for fact in tasks.facts(3, 8):
    assert len(set(fact.statements)) == len(set(fact.questions)) == 2
    for statement in fact.statements:
      assert fact.who in statement and fact.what in statement
    for question in fact.questions:
      assert fact.who in question and fact.what not in question
      assert question not in fact.statements
    assert fact.what not in fact.others and len(fact.others) >= 1
    assert fact.what != fact.who


def test_nobody_and_no_place_is_invented_twice():
  for relation in ('city', 'friend'):
    fact = tasks.facts(0, 400, [relation])[0]
    known = {fact.what, *fact.others, fact.who}
    assert len(known) == 400 + (relation == 'city')
  # of two people's homes alone one could be guessed half of the time
  fact = tasks.facts(0, 2, ['city'])[0]
  assert len({fact.what, *fact.others}) == 4


def test_facts_make_a_task():
  facts = tuple(tasks.facts(0, 2, ['city', 'pet']))
  task = tasks.FactsTask(facts, encode, bos=256)
  context = task.context()
  assert context[0] == 256
  assert all(fact.statements[0] in decode(context) for fact in facts)
  assert decode(context).endswith('\nIn other words:')
  questions = task.questions()
  assert len(questions) == 8
  prompt, answer = questions[0]
  assert prompt[0] == 256
  assert decode(prompt) == f'Question: {facts[0].questions[0]}\nAnswer:'
  assert decode(answer) == f' {facts[0].what}'


@pytest.mark.parametrize(
  'people, relations, words',
  [(1, (), '1 people'), (2, ('shoe',), 'unknown relation shoe: there are')],
)
def test_impossible_facts_are_refused(people, relations, words):
  with pytest.raises(TaskError, match=words):
    tasks.facts(0, people, relations)


PAIR = {'input': [[0, 1], [2, 3]], 'output': [[3]]}


def written(tmp_path, value):
  path = tmp_path / 'rule.json'
  path.write_text(value if isinstance(value, str) else json.dumps(value))
  return path


def test_grids_make_a_task(tmp_path):
  path = written(tmp_path, {'train': [PAIR, PAIR], 'test': [PAIR]})
  task = tasks.arc(path, encode, bos=256)
  assert task.name == 'rule'
  once = 'input:\n01\n23\noutput:\n3\n'
  assert decode(task.context()) == f'{once}\n{once}\n'
  ((prompt, answer),) = task.questions()
  assert decode(prompt) + decode(answer) == once
  assert decode(answer) == '3\n'


@pytest.mark.parametrize(
  'value, words',
  [
    ('{', 'not JSON'),
    ({'train': [PAIR]}, 'not an ARC task'),
    ({'train': [], 'test': [PAIR]}, 'no pairs'),
    ({'train': [PAIR], 'test': []}, 'none to ask'),
    ({'train': [PAIR | {'output': [[1], [1, 2]]}], 'test': [PAIR]}, 'train 0'),
    ({'train': [PAIR | {'output': [[10]]}], 'test': [PAIR]}, 'colour 10'),
    ({'train': [PAIR | {'output': [[0]] * 31}], 'test': [PAIR]}, '31 rows'),
    ({'train': [PAIR | {'output': [[0] * 31]}], 'test': [PAIR]}, r'\[31\] cel'),
    ({'train': [PAIR | {'output': 3}], 'test': [PAIR]}, 'not a list of rows'),
  ],
  ids='json half empty unasked ragged colour tall wide number'.split(),
)
def test_files_that_are_no_tasks_are_refused(tmp_path, value, words):
  with pytest.raises(TaskError, match=words):
    tasks.arc(written(tmp_path, value), encode, 256)


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere.json'):
    tasks.arc(tmp_path / 'nowhere.json', encode, 256)


def test_the_tasks_of_arc_agi_1_are_read():
  folder = DATA / 'arc_agi_1' / 'data' / 'training'
  if not folder.is_dir():
    pytest.skip(f'no ARC-AGI-1 in {folder}')
  files = sorted(folder.glob('*.json'))[:40]
  for path in files:
    task = tasks.arc(path, encode, 256)
    assert len(task.context()) > 20 and task.questions()
