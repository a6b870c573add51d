"""Classes come in stages; what is measured is worked out by hand."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.cms import update
from nestax.launch import trained
from nestax.launch.data import tokenizers
from nestax.launch.evals import (
  asking,
  classes,
  classifiers,
  incremental,
  learners,
  suite,
)
from nestax.models import language_model, model_state
from nestax.sleep import reader as readers

ROOT = pathlib.Path(__file__).parents[1]
SHARED = pathlib.Path(
  os.environ.get('NESTAX_DATA', ROOT.parent / 'shared/data')
)
PAIRS = [['a b', 'x'], ['c\nd', 'y'], ['e', 'x'], ['f', 'z'], ['g', 'y']]
HOW = classifiers.How(passes=1, rate=1e-2, rows=4, window=32)


def test_measures_are_those_worked_out_by_hand():
  right = [[0.8], [0.6, 1.0], [0.7, 0.5, 0.9]]
  got = classes.measures(right, [10, 10, 20])
  want = {
    'final': 100 * (7 + 5 + 18) / 40,
    'average': 100 * (0.8 + 0.8 + 0.75) / 3,
    'forgetting': 100 * ((0.8 - 0.7) + (1.0 - 0.5)) / 2,
    'backward': 100 * ((0.7 - 0.8) + (0.5 - 1.0)) / 2,
  }
  assert got.pop('stages') == pytest.approx([80, 80, 75])
  assert got == pytest.approx(want)
  # what was better later is forgotten from there
  late = classes.measures([[0.2], [0.9, 0.5], [0.4, 0.5, 0.0]], [1, 1, 1])
  assert late['forgetting'] == pytest.approx(25)
  assert late['backward'] == pytest.approx(10)
  one = classes.measures([[0.5]], [4])
  assert (one['final'], one['forgetting'], one['backward']) == (50, 0, 0)


def write(tmp_path, kind):
  path = tmp_path / f'data.{kind}'
  if kind == 'json':
    path.write_text(json.dumps({'train': PAIRS, 'test': PAIRS[:1]}))
  elif kind == 'jsonl':
    path.write_text(
      ''.join(json.dumps({'t': t, 'c': c}) + '\n' for t, c in PAIRS)
    )
  else:
    split = {'csv': ',', 'tsv': '\t'}[kind]
    rows = [['id', 't', 'c']] + [['1', f'"{t}"', c] for t, c in PAIRS]
    path.write_text('\n'.join(split.join(row) for row in rows))
  return path


@pytest.mark.parametrize('kind', ['json', 'jsonl', 'csv', 'tsv'])
def test_examples_are_read_from_every_kind_of_file(tmp_path, kind):
  got = classes.read(write(tmp_path, kind), 'train', 't', 'c')
  assert got == [classes.Example(' '.join(t.split()), c) for t, c in PAIRS]


def test_other_files_are_refused_in_words(tmp_path):
  with pytest.raises(ValueError, match='data.csv: there is no .intent. in it'):
    classes.read(write(tmp_path, 'csv'), 'train', 't', 'intent')
  with pytest.raises(ValueError, match='there is no .valid. in it'):
    classes.read(write(tmp_path, 'json'), 'valid', 't', 'c')
  path = tmp_path / 'x.json'
  for text, words in (
    ('{', 'not JSON'),
    ('{"train": [1]}', 'not pairs'),
    ('{"train": []}', 'no examples'),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
      classes.read(path, 'train', 't', 'c')
  with pytest.raises(ValueError, match='.json, .jsonl, .csv or .tsv'):
    classes.read(tmp_path / 'x.parquet', 'train', 't', 'c')
  path.write_text('[1, 2]')
  with pytest.raises(ValueError, match='not a JSON object of lists'):
    classes.groups(path)


def test_stages_hold_each_class_once_and_no_more_than_asked():
  train = [classes.Example(f'{c}{i}', c) for c in 'abcde' for i in range(4)]
  test = [classes.Example(f'{c}?', c) for c in 'abcde']
  rng = np.random.default_rng(0)
  together = classes.deal([e.label for e in train], 2, rng)
  assert sorted(sum(together, ())) == list('abcde')
  made = classes.stages(train, test, together, rng, most_train=3)
  for stage in made:
    assert sorted({e.label for e in stage.train}) == sorted(stage.labels)
    assert len(stage.train) == 3 * len(stage.labels)
    assert len(stage.test) == len(stage.labels)
  with pytest.raises(ValueError, match='stages=6: from 1 to the 5 classes'):
    classes.deal('abcde', 6, rng)
  with pytest.raises(ValueError, match="'e' belongs to no stage"):
    classes.stages(train, test, [tuple('abcd')], rng)
  with pytest.raises(ValueError, match="'a' has no example in the test part"):
    classes.stages(train, test[1:], [tuple('abcde')], rng)


def stage(*labels):
  examples = [classes.Example(label * 6, label) for label in labels]
  return classes.Stage(labels, tuple(examples * 4), tuple(examples))


def test_all_classes_so_far_are_there_to_choose_from():
  asked = []

  def choose(memory, names, texts):
    asked.append((tuple(memory), tuple(names), len(texts)))
    return [names[-1]] * len(texts)  # the class that came last

  method = classifiers.Method(
    lambda memory, stage, rng: [*memory, *stage.labels], choose, []
  )
  stages, said = [stage('p', 'q'), stage('r')], []
  right = incremental.go(method, stages, None, said.append)
  assert right == [[0.5], [0.0, 1.0]] and said == [1, 2]
  assert asked == [
    (('p', 'q'), ('p', 'q'), 2),
    (('p', 'q', 'r'), ('p', 'q', 'r'), 2),
    (('p', 'q', 'r'), ('p', 'q', 'r'), 1),
  ]


def made_of(cfg):
  cfg = dataclasses.replace(cfg, V=259)
  return trained.Trained(
    language_model.LanguageModel(cfg),
    cases.params_of(cfg),
    tokenizers.load('bytes'),
    0,
    'bytes',
  )


def test_means_are_of_frozen_features_and_forget_nothing():
  made = made_of(cases.config('transformer'))
  cfg, rows = made.model.cfg, np.array(cases.tokens(2, 8))
  got = classifiers.features(cfg, made.params, rows, np.array([3, 8]))
  # the padding of a row changes nothing
  rows[0, 3:] = 7
  again = classifiers.features(cfg, made.params, rows, np.array([3, 8]))
  np.testing.assert_allclose(got, again, atol=1e-6)
  logits = made.model.apply({'params': made.params}, None, jnp.array(rows))[1]
  head = made.params['embed']['embedding']
  np.testing.assert_allclose(got[1] @ head.T, logits[1].mean(0), atol=1e-4)
  right = incremental.go(
    classifiers.means(made, HOW),
    [stage('a', 'm'), stage('z')],
    None,
    lambda done: None,
  )
  assert right == [[1.0], [1.0, 1.0]]


def test_the_nearest_mean_is_by_angle_from_the_middle():
  means = {'x': np.array([3.0, 1.0]), 'y': np.array([1.0, 1.0])}
  rows = np.array([[2.1, 9.0], [1.9, -9.0]])
  assert classifiers.nearest(means, ['y', 'x'], rows) == ['x', 'y']


def test_weights_are_tuned_stage_after_stage():
  made = made_of(cases.config('transformer'))
  how = dataclasses.replace(HOW, passes=60)
  method = classifiers.tuning(made, how)
  right = incremental.go(
    method, [stage('b', 'w')], np.random.default_rng(0), lambda done: None
  )
  assert right == [[1.0]]
  # classes that were never learned are not chosen
  params = method.learn(made.params, stage('b'), np.random.default_rng(0))
  assert method.choose(params, ['b', 'w'], ['wwwwww']) == ['b']


@pytest.mark.parametrize('prior', [False, True])
def test_a_name_likely_after_anything_can_be_weighed_less(monkeypatch, prior):
  made = made_of(cases.config('transformer'))
  how = dataclasses.replace(HOW, prior=prior)
  encode = made.tokenizer.encode
  likely = {'': (-5.0, -1.0), 'it': (-4.0, -1.0), 'no': (-6.0, -0.5)}
  of = {
    (
      tuple([256, *encode(classifiers.put(text))]),
      tuple(encode(f' {name}\n')),
    ): x
    for text, logs in likely.items()
    for name, x in zip('bw', logs)
  }

  def score(asked, pairs):
    found = [of[tuple(prompt), tuple(answer)] for prompt, answer in pairs]
    return [asking.Score(x, False) for x in found]

  monkeypatch.setattr(asking, 'score', score)
  choose = classifiers.tuning(made, how).choose
  got = choose(made.params, ['b', 'w'], ['it', 'no'])
  assert got == (['b', 'w'] if prior else ['w', 'w'])


def test_levels_choose_by_what_they_have_written():
  made = made_of(cases.config('hope_attention', N=1, periods=(64,), rate=1.0))
  method = classifiers.levels(made, HOW)
  state = method.learn(None, stage('b', 'w'), np.random.default_rng(0))
  assert int(state.levels.held_B[0]) == 0  # nothing waits to be learned
  context, cfg = readers.learned(state), made.model.cfg
  assert max(float(abs(x).max()) for x in jax.tree.leaves(context)) > 0
  names, texts = ['b', 'w'], ['bbb', 'www']
  got = method.choose(state, names, texts)
  encode = made.tokenizer.encode
  asked = asking.Asked(cfg, made.params, 4, context=context)
  for text, chosen in zip(texts, got):
    prompt = [256, *encode(classifiers.put(text))]
    pairs = [(prompt, encode(f' {name}\n')) for name in names]
    logs = [score.log for score in asking.score(asked, pairs)]
    assert chosen == names[int(np.argmax(logs))]
  with pytest.raises(ValueError, match='no level of this model learns'):
    classifiers.levels(made_of(cases.config('transformer')), HOW)


def test_examples_read_alone_are_learned_as_they_will_be_asked_for():
  made = made_of(cases.config('hope_attention', N=2, periods=(64,), rate=0.5))
  cfg, params = made.model.cfg, made.params
  method = classifiers.levels(made, dataclasses.replace(HOW, alone=True))
  rng = np.random.default_rng(0)
  state = method.learn(None, stage('b', 'w'), rng)
  want = jax.tree.map(jnp.copy, readers.learned(state))
  again = model_state.forget_mixers(cfg, state, 64)
  texts = jnp.array(cases.tokens(1, 40))
  _, said = cases.applied(cfg)({'params': params}, again, texts)
  got = readers.learned(method.learn(state, stage('q'), rng))
  # two of its four examples a call; by hand as if nothing had been read before
  encode = made.tokenizer.encode
  row = 2 * [256, *encode(classifiers.put('qqqqqq') + ' q\n\n')]
  row = jnp.array([row + 16 * encode('\n')])
  read = readers.of_model(cfg)

  _, asked = jax.jit(read.read)(params, read.fresh(want, 1, 64), texts)
  np.testing.assert_allclose(said, asked, atol=1e-5)

  def loss(written):
    logits = read.read(params, read.fresh(written, 1, 64), row)[1][0, :-1]
    logs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logs, row[0, 1:, None], 1).mean()

  @jax.jit
  def commit(written):
    (grads,) = jax.grad(loss)(written)
    step, _ = update.step(cfg.cms.update, None, grads, jnp.full(cfg.N, 0.5))
    return jax.tree.map(jnp.add, written, (step,))

  want = commit(commit(want))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), got, want
  )


def test_whole_examples_fill_periods():
  rows = [[1] * 3, [2] * 4, [3] * 2, [4] * 9, [5]]
  got = classifiers._whole(rows, 8, 0)
  assert got == [
    [1, 1, 1, 2, 2, 2, 2, 0],
    [3, 3, 0, 0, 0, 0, 0, 0],
    [4] * 9 + [0] * 7,
    [5, 0, 0, 0, 0, 0, 0, 0],
  ]


def test_cells_go_by_method_and_model(tmp_path, monkeypatch):
  path = tmp_path / 'data.json'
  rows = [[f'{c}{c}', c] for c in 'abcd' for _ in range(2)]
  path.write_text(json.dumps({'train': rows, 'test': rows}))
  options = incremental.Options(
    str(path), stages=2, methods='means+tuning', how=HOW
  )
  asked = suite.Asked(('m',), seeds=2)
  found = list(incremental.cells(options, asked))
  assert [cell.model for cell in found] == ['means, m', 'tuning, m']
  incremental._model.cache_clear()
  made = made_of(cases.config('transformer'))
  monkeypatch.setattr(learners, 'load', lambda word: made)
  rows = found[0].run(lambda done, of: None)
  assert [row['seed'] for row in rows] == [0, 1]
  assert set(rows[0]['scores']) == {
    'final',
    'average',
    'forgetting',
    'backward',
  }
  assert len(rows[0]['stages']) == 2
  with pytest.raises(ValueError, match='of levels.tuning.means'):
    list(incremental.cells(dataclasses.replace(options, methods='luck'), asked))
  with pytest.raises(ValueError, match='examples are needed'):
    list(incremental.cells(incremental.Options(), asked))
  for name in ('passes', 'rows', 'window'):
    with pytest.raises(ValueError, match=f'{name}=0: at least 1'):
      classifiers.How(**{name: 0})


@pytest.mark.skipif(not SHARED.exists(), reason='the data are not here')
def test_the_real_files_are_read():
  folder = SHARED / 'clinc150'
  train = classes.read(folder / 'data_small.json', 'train', '', '')
  test = classes.read(folder / 'data_small.json', 'test', '', '')
  together = classes.groups(folder / 'domains.json')
  made = classes.stages(train, test, together, np.random.default_rng(0))
  assert [len(stage.labels) for stage in made] == [15] * 10
  assert sum(len(stage.test) for stage in made) == 4500
