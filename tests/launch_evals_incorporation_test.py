"""Passages are read, forgotten or not, and answers scored as SQuAD does."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import sleep_cases as cases

from nestax.launch import trained
from nestax.launch.data import tokenizers
from nestax.launch.evals import (
  asking,
  incorporation,
  learners,
  passages,
  scoreboard,
  squad,
  suite,
)
from nestax.launch.evals.passages import Held, Reading
from nestax.launch.evals.sleepers import Sleeper
from nestax.launch.evals.squad import Passage, Question
from nestax.models import language_model
from nestax.sleep.dream import DreamConfig
from nestax.sleep.objective import SeedConfig
from nestax.sleep.task import TaskError
from nestax.sleep.texts import TextsConfig
from nestax.sleep.tools import CycleConfig

MARS = Passage(
  'Mars', 'Zog lives on Mars. He eats red sand.',
  (Question('Who?', ('Zog', 'He')), Question('What?', ('red sand',))),
)  # fmt: skip
MOON = Passage('Moon', 'Ulu owns a boat.', (Question('Who?', ('Ulu',)),))
SUN = Passage('', 'It is hot there. No one goes.', (Question('So?', ('hot',)),))
HOW = Reading(passes=2, window=8, piece=8, most=4, rows=2, past=4)
NIGHT = CycleConfig(
  seed=SeedConfig(steps=2, rows=2, group=2),
  texts=TextsConfig(length=16, read=2, continued=0, free=0, kept=2),
  dream=DreamConfig(length=512, answer=32),
)


def seal(path, some):
  rows = [
    {
      'title': p.title,
      'context': p.text,
      'questions': [
        {'question': q.text, 'answer': q.answers[0]} for q in p.questions
      ],
    }
    for p in some
  ]
  path.write_text(json.dumps(rows), encoding='utf-8')
  return str(path)


def test_both_formats_are_read(tmp_path):
  (mars, moon) = squad.read(seal(tmp_path / 'seal.json', [MARS, MOON]))
  assert moon == MOON and mars.questions[0] == Question('Who?', ('Zog',))
  none = {'question': 'Why?', 'answers': [], 'is_impossible': True}
  several = [{'text': 'Zog'}, {'text': 'He'}, {'text': 'Zog'}]
  asked = [{'question': 'Who?', 'answers': several}, none]
  paragraph = {'context': MARS.text, 'qas': asked}
  empty = {'context': 'x', 'qas': [none]}
  article = {'title': 'Mars', 'paragraphs': [paragraph, empty]}
  path = tmp_path / 'squad.json'
  path.write_text(json.dumps({'version': '2.0', 'data': [article]}))
  assert squad.read(path) == [MARS._replace(questions=MARS.questions[:1])]


@pytest.mark.parametrize(
  'text, words',
  [
    ('{', 'not JSON'),
    ('{"rows": []}', 'neither SQuAD'),
    ('3', 'neither SQuAD'),
    ('[{"context": "x"}]', "passage 1: needs context .*'questions'"),
    ('[]', 'no passage with a question'),
  ],
)
def test_other_files_are_refused_in_words(tmp_path, text, words):
  path = tmp_path / 'x.json'
  path.write_text(text)
  with pytest.raises(ValueError, match=words):
    squad.read(path)


def test_answers_are_scored_as_squad_scores_them():
  assert squad.normalise(' The  "Denver" Broncos, a team. ') == (
    'denver broncos team'
  )
  assert squad.exact('an apple!', ['pear', 'Apple']) == 1
  assert squad.exact('apples', ['apple']) == 0
  # one word of two said, of three wanted: P = 1/2, R = 1/3
  assert squad.f1('red dog', ['red hot sand']) == pytest.approx(0.4)
  # a word said twice counts twice only if it is wanted twice
  assert squad.f1('red red', ['red sand']) == pytest.approx(0.5)
  assert squad.f1('red sand', ['x', 'the red sand']) == 1
  assert squad.f1('', ['red']) == 0


@pytest.fixture(scope='module')
def made():
  cfg = cases.config('hope_attention', N=1, periods=(8,), rate=1.0)
  cfg = dataclasses.replace(cfg, V=259)
  return trained.Trained(
    language_model.LanguageModel(cfg),
    cases.params_of(cfg),
    tokenizers.load('bytes'),
    0,
    'bytes',
  )


def test_a_life_is_days_each_followed_by_a_night(made):
  evenings = []

  def night(evening):
    evenings.append(evening)
    params = evening.params | {'night': evening.number}
    return params, {'number': np.float32(evening.number)}, {'night': 1.5}

  world = passages.world(made, [SUN], 16)
  days = [[MARS], [MOON, SUN]]

  def live(**how):
    evenings.clear()
    sleeper = Sleeper(night, **how)
    return passages.learn(world, HOW, sleeper, NIGHT, days, 0)

  held = live()
  assert held.params['night'] == 2 and held.context is None
  assert held.nights[1] == {'numbers': {'number': 2}, 'seconds': {'night': 1.5}}
  one, two = evenings
  assert one.past is None and len(two.past.length_B) == HOW.past
  assert one.params is made.params and two.params['night'] == 1
  # the day's rows are all that was read, every passage twice
  encode = made.tokenizer.encode
  (read,) = one.day.read
  told = [i for row, n in zip(*read[::2]) for i in row[:n]]
  assert told == [256, *encode(f'Mars\n{MARS.text}\n\n' * 2)]
  (read,) = two.day.read
  told = bytes(i for row, n in zip(*read[::2]) for i in row[:n] if i < 256)
  assert told.count(b'Ulu owns') == told.count(b'It is hot') == 2
  # levels have learned all of their day, and of the second day that alone
  clocks = [int(e.state.levels.clock_B[0]) for e in evenings]
  assert [len(e.tasks) for e in evenings] == [1, 2]
  assert all(int(e.state.levels.held_B[0]) == 0 for e in evenings)
  live(resets=False)
  assert int(evenings[1].state.levels.clock_B[0]) == sum(clocks)
  held = live(resets=False)
  written = max(float(abs(x).max()) for x in jax.tree.leaves(held.context))
  assert written > 0
  assert live(reads=False).context is None and evenings[0].state is None


def test_questions_are_asked_alone_or_behind_their_passage(made, monkeypatch):
  world, prompts = passages.world(made, [SUN], 16), []

  def score(asked, pairs):
    assert asked.context == 'levels' and asked.params is made.params
    prompts[:] = [bytes(prompt[1:]).decode() for prompt, _ in pairs]
    return [asking.Score(-6.0, False) for _ in pairs]

  def write(asked, tokenizer, prompts, most, stops):
    return [f' Zog {most}'] * len(prompts)

  monkeypatch.setattr(asking, 'score', score)
  monkeypatch.setattr(passages.writing, 'write', write)
  held = Held(made.params, 'levels')
  got = passages.ask(world, HOW, held, [MARS, MOON])
  # ' Zog' is four tokens, ' He' three, of which the likelier counts
  assert [[one.log for one in some] for some in got] == [
    [-1.5, -6 / 9],
    [-1.5],
  ]
  assert got[0][0].f1 == pytest.approx(2 / 3) and got[0][0].said == 'Zog 4'
  who, what = 'Question: Who?\nAnswer:', 'Question: What?\nAnswer:'
  assert prompts == [who, who, what, who]
  passages.ask(world, HOW, held, [MOON], shown=True)
  assert prompts == [f'Moon\nUlu owns a boat.\n\n{who}']
  few = dataclasses.replace(HOW, questions=1)
  assert [len(x) for x in passages.ask(world, few, held, [MARS])] == [1]


def test_dreams_are_about_the_passage_and_not_its_questions(made):
  task = passages.Implications(MARS, made, NIGHT.dream)
  context = bytes(task.context()[1:]).decode()
  assert context == passages.IMPLY + MARS.text + passages.IMPLIED
  said = [
    (bytes(q[1:]).decode(), bytes(a).decode()) for q, a in task.questions()
  ]
  assert said == [('Zog lives', ' on Mars.'), ('He eats', ' red sand.')]
  long = MARS._replace(text=MARS.text * 100)
  longer = dataclasses.replace(task, passage=long)
  assert len(longer.context()) == 512 - 128
  short = dataclasses.replace(task, cfg=DreamConfig(length=64))
  with pytest.raises(TaskError, match='dream.length=64: no room'):
    short.context()
  mute = dataclasses.replace(task, passage=MARS._replace(text='Zog.'))
  with pytest.raises(TaskError, match="'Mars': no sentence of two words"):
    mute.questions()


@pytest.fixture
def options(tmp_path):
  return incorporation.Options(
    seal(tmp_path / 'x.json', [MARS, MOON, SUN]),
    methods='before+fine-tuning+fine-tuning, replay+levels',
    single=1,
    continual=2,
    core=1,
    tuning_rate=0.03,
    rank=4,
    how=HOW,
    night=NIGHT,
  )


def test_cells_go_by_task_method_and_model(options, made, monkeypatch):
  asked = suite.Asked(('m',), seeds=2)
  found = {
    c.model + '/' + c.task: c for c in incorporation.cells(options, asked)
  }
  assert list(found) == [
    'before, m/single', 'before, m/continual', 'fine-tuning, m/single',
    'fine-tuning, m/continual', 'fine-tuning, replay, m/continual',
    'levels, m/single', 'levels, m/continual',
  ]  # fmt: skip
  for seed in range(4):
    one, core = incorporation.draw(options, 'single', seed)
    both, same = incorporation.draw(options, 'continual', seed)
    assert core == same and both[:1] == one and core[0] not in both
  assert options.lives('single', 'ab') == [[['a']], [['b']]]
  by_two = dataclasses.replace(options, day=2)
  assert by_two.lives('continual', 'abc') == [[['a', 'b'], ['c']]]

  night = dataclasses.replace(NIGHT, seed=SeedConfig(steps=30, rows=2, group=2))
  options = dataclasses.replace(options, night=night)
  incorporation._model.cache_clear()
  monkeypatch.setattr(learners, 'load', lambda word: made)
  got, said = {}, []
  for name in ('before', 'fine-tuning', 'fine-tuning, replay'):
    (got[name],) = incorporation.run_cell(
      options, 'm', name, 'continual', 1, lambda *x: said.append(x)
    )
  assert said == [(2, 2)] * 3
  logs = {k: row['scores']['log-likelihood'] for k, row in got.items()}
  cores = {k: row['scores']['core'] for k, row in got.items()}
  # an untrained model: what is learned is which letters there are
  assert logs['fine-tuning'] > logs['before'] + 0.5
  assert cores['fine-tuning'] != cores['before']
  assert cores['before'] == pytest.approx(-np.log(259), rel=0.1)
  assert logs['fine-tuning, replay'] != logs['fine-tuning']
  assert [len(row['nights']) for row in got.values()] == [0, 2, 2]
  json.dumps(got)  # as a cell is kept
  row = got['before']
  assert row['questions'] == sum(map(len, [p.questions for p in
    incorporation.draw(options, 'continual', 0)[0]]))  # fmt: skip
  assert len(row['passages']) == 2
  assert logs['before'] == pytest.approx(-np.log(259), rel=0.1)


def test_what_cannot_be_is_refused_in_words(options, made):
  asked = suite.Asked(('m',))

  def refused(words, **values):
    changed = dataclasses.replace(options, **values)
    with pytest.raises(ValueError, match=words):
      list(incorporation.cells(changed, asked))

  refused("'luck' is not one of before.in context", methods='before+luck')
  refused('incorporation.file=FILE', file='')
  refused('3 passages; incorporation.single=3 and core=1 want 4', single=3)
  with pytest.raises(ValueError, match='day=0: at least 1'):
    incorporation.Options(day=0)
  with pytest.raises(ValueError, match='passes=0: at least 1'):
    Reading(passes=0)
  frozen = cases.config('transformer')
  plain = made._replace(model=language_model.LanguageModel(frozen))
  with pytest.raises(ValueError, match='no level of this model learns'):
    incorporation.ready(plain, 'm', 'sleep', 1, options)
  assert incorporation.ready(plain, 'm', 'fine-tuning', 1, options) is plain
  ready = incorporation.ready(made, 'm', 'sleep', 3, options)
  assert ready.model.cfg.cms.slots == 3
  assert incorporation.ready(made, 'm', 'levels', 3, options) is made


def test_the_table_has_nats_to_two_places_and_no_average():
  scores = {
    ('single', 'exact'): scoreboard.Score(12.5, 0.0, 1),
    ('single', 'log-likelihood'): scoreboard.Score(-3.214, 0.106, 2),
  }
  board = scoreboard.Board(
    incorporation.EVALUATION, {'sleep, m': scores}, list(scores)
  )
  lines = scoreboard.table(board).splitlines()
  rows = [[x.strip() for x in line.split('|')[1:-1]] for line in lines]
  assert ['sleep, m', '12.50', '-3.21 ± 0.11', '-', '1/2'] in rows
  paper = 'Sleep of two levels, graded (Sleep, Table 3)'
  assert [paper, '48.1', '-', '-', '-'] in rows


@pytest.mark.slow
def test_a_night_goes_through(options, made, monkeypatch):
  incorporation._model.cache_clear()
  monkeypatch.setattr(learners, 'load', lambda word: made)
  for name in ('sleep', 'sleep and dreams'):
    (row,) = incorporation.run_cell(
      options, 'm', name, 'continual', 1, lambda *x: None
    )
    assert all(np.isfinite(x) for x in row['scores'].values())
    dreamt = ['dream_paid' in night['numbers'] for night in row['nights']]
    assert dreamt == [name == 'sleep and dreams'] * 2
