"""Small models are trained, picked by other rows than they are scored on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from echo_cases import PROBLEM, TRAINING, echo

from nestax.launch.evals import (
  entrants,
  mad,
  picking,
  problems,
  running,
  suite,
  sweep,
  trials,
)


def test_training_ends_where_it_is_enough():
  training = dataclasses.replace(
    TRAINING, rates=(3e-2, 5e-2), evaluations=8, enough=1.0
  )
  asked = suite.Asked(('transformer',), seeds=2)
  (cell,) = trials.cells([PROBLEM], training, asked)
  told = []
  rows = cell.run(lambda done, of: told.append(done))
  # told to the end of training only where a run has not been there before
  assert told == [5 * i for i in range(1, len(told) + 1)] and told[-1] < 40
  for row in rows:
    at = [step for step, valid, _ in row['curve'] if valid >= 1.0]
    assert row['step'] == at[0] and None not in row['scores'].values()
    # no more of a run than until it ended, however long the others go on
    assert [step for step, *_ in row['curve']] == told[: len(row['curve'])]
    assert row['curve'][-1][0] == at[0] and row['last'] == row['scores']
  with pytest.raises(ValueError, match='enough=101: 0 to 100'):
    dataclasses.replace(training, enough=101)


@pytest.mark.parametrize('best', ['', 'valid', 'loss'])
def test_the_better_rate_is_picked_and_scored(best):
  asked = suite.Asked(('transformer',), seeds=2)
  training = dataclasses.replace(TRAINING, best=best)
  (cell,) = trials.cells([PROBLEM], training, asked)
  assert cell.key['a'] == 1 and cell.key['training']['batch'] == 8
  told = []
  rows = cell.run(lambda done, of: told.append((done, of)))
  assert told == [(20, 40), (40, 40)]
  assert [row['seed'] for row in rows] == [0, 1]
  for row in rows:
    assert row['rate'] == 3e-2 and row['edge']
    assert set(row['scores']) == {'rows', 'again'}
    assert [point[0] for point in row['curve']] == [20, 40]
    assert row['curve'][1][2] < row['curve'][0][2]
    # as on the rows to validate, which are alike; ln 8 before training
    assert row['losses'].keys() == row['scores'].keys()
    for nats in row['losses'].values():
      assert nats == pytest.approx(row['loss'], rel=0.3) and nats < 2.0
    assert row['grid']['1e-06'] < 20 < 50 < row['grid']['0.03']
    assert row['step_ms'] > 0
    assert row['step'] == 40  # better than at 20, so that both rules agree
    assert None not in row['scores'].values()
    assert row['last'] == row['scores']  # it is the last that counts
  assert rows[0]['loss'] != rows[1]['loss']


def test_the_best_evaluation_is_scored_and_the_last_told(monkeypatch):
  found = [
    {'rate': 0.1, 'seed': 0, 'step': step, 'valid': valid, 'loss': 0.5}
    | {f'test {name}': score for name in PROBLEM.tests}
    | {f'loss {name}': 0.1 for name in PROBLEM.tests}
    for step, valid, score in ((20, 90.0, 80.0), (40, 70.0, 60.0))
  ]
  monkeypatch.setattr(
    trials, '_together', lambda *args: (found, [], lambda run: 1.0)
  )
  training = dataclasses.replace(TRAINING, rates=(0.1,), best='valid')
  asked = suite.Asked(('transformer',), seeds=1)
  (cell,) = trials.cells([PROBLEM], training, asked)
  (row,) = cell.run(lambda done, of: None)
  assert row['step'] == 20 and row['scores'] == {'rows': 80.0, 'again': 80.0}
  assert row['last'] == {'rows': 60.0, 'again': 60.0}


def test_what_changes_no_result_makes_no_other_cell(
  tmp_path, monkeypatch, caplog
):
  """But is what the next cell runs with."""
  words = 'transformer:F=16', 'transformer:remat=full;F=16;memory.stride=4'
  seen = []

  def train(problem, cfg, training, seeds, say, kept):
    seen.append(cfg)
    return [{'seed': seed, 'scores': {'rows': 50.0}} for seed in range(seeds)]

  monkeypatch.setattr(trials, 'train', train)

  def run(*models, **options):
    asked = suite.Asked(models, seeds=1, workdir=tmp_path)
    training = dataclasses.replace(TRAINING, apart=True)
    cells = list(trials.cells([PROBLEM], training, asked))
    one = suite.Evaluation('some', None, lambda *_: iter(cells), '')
    return running.run([one], asked)

  (row,) = run(words[1])
  assert (seen[0].remat, seen[0].memory.stride) == ('full', 4)
  assert row['model'] == words[0]
  # of the other words, of both, and of others that change nothing either
  more = 'transformer:F=16;unroll=2;cms.remat=groups;memory.remat=False'
  assert run(words[0]) == run(*words) == run(more) == [row]
  assert len(seen) == 1
  # what is left out is said, once
  assert caplog.text.count(f'{words[0]}: not run, as it gives what') == 1
  assert [row['model'] for row in run(words[1], 'transformer')] == [
    words[0],
    'transformer',
  ]
  kept = [
    trials._kept(suite.Asked(()), 'a', entrants.name(word), {
      'seeds': 1,
      'training': {'rates': [1], 'trial': 0},
      'config': entrants.result_key(entrants.config(word, TRAINING.base(8))),
    })
    for word in (*words, 'transformer')
  ]  # fmt: skip
  assert kept[0] == kept[1] != kept[2]


def test_words_of_the_same_result_are_all_checked():
  words = 'transformer:remat=perhaps', 'transformer'
  with pytest.raises(ValueError, match='perhaps'):
    next(trials.cells([PROBLEM], TRAINING, suite.Asked(words)))


def test_runs_are_kept_for_their_device(tmp_path, monkeypatch):
  asked = suite.Asked(('transformer',), seeds=2, workdir=tmp_path)
  key = {'seeds': 2, 'training': {'rates': [1], 'trial': 0}}
  here = trials._kept(asked, 'a', 'b', key)
  more = {'seeds': 3, 'training': {'rates': [1, 2], 'trial': 5}}
  assert trials._kept(asked, 'a', 'b', more) == here
  monkeypatch.setattr(trials.timing, 'device', lambda: 'another')
  assert trials._kept(asked, 'a', 'b', key).folder != here.folder


def test_rows_are_read_in_epochs_and_tests_are_others():
  data = problems.data(PROBLEM, TRAINING, 2)
  order = data['train order']
  assert order.shape == (2, 40, 8)
  first = order[0].reshape(-1)[:60]
  assert sorted(first) == list(range(60))
  assert (order[0] != order[1]).any()
  shapes = {x['tokens'].shape for x in data['tests'].values()}
  assert shapes == {(3, 8, 6)}  # 20 rows in batches of 8
  padding = data['tests']['rows']['weights'][2, 4:]
  assert padding.size and not padding.any()
  few = problems.in_batches(echo(np.random.default_rng(0), 5), 64)
  assert few['tokens'].shape == (1, problems.FEW, 6)
  assert few['weights'][0, :5].any(1).all() and not few['weights'][0, 5:].any()
  draws = [data['train']['tokens'][:20]]
  for split in ('valid', 'tests'):
    draws += [x['tokens'].reshape(-1, 6) for x in data[split].values()]
  for i, one in enumerate(draws):
    assert all((one[:8] != other[:8]).any() for other in draws[:i])


def test_a_test_without_rows_is_refused():
  def none(rng, rows):
    return {name: x[:0] for name, x in echo(rng, rows).items()}

  empty = PROBLEM._replace(tests={'rows': none})
  with pytest.raises(
    ValueError, match='echo: of rows there are no rows to pick'
  ):
    problems.data(empty, TRAINING, 1)
  empty = empty._replace(valid={'rows': echo})
  with pytest.raises(ValueError, match='of rows there are no rows to test'):
    problems.data(empty, TRAINING, 1)


def test_early_rows_that_get_no_steps_are_refused_before_training():
  problem = PROBLEM._replace(early=(echo,), share=0.1)
  asked = suite.Asked(('transformer',), seeds=1)
  with pytest.raises(
    ValueError, match='share=0.1 of 40 steps, evaluated every'
  ):
    next(trials.cells([problem], TRAINING, asked))
  halves = dataclasses.replace(TRAINING, apart=True, trial=20)
  with pytest.raises(ValueError, match='share=0.5 of 20 steps'):
    next(trials.cells([problem._replace(share=0.5)], halves, asked))


def test_no_more_early_rows_are_drawn_than_are_read():
  problem = PROBLEM._replace(early=(echo, echo), share=0.5)
  many = dataclasses.replace(TRAINING, examples=1000, evaluations=8, apart=True)
  run, batches = [*range(10, 20)], []
  for trial, more in ((0, []), (20, [*range(5, 10)])):
    training = dataclasses.replace(many, trial=trial)
    assert problems.steps_of(problem, training, 1) == (run, more)
    data = problems.data(problem, training, 2)
    rows = data['early 1']['tokens']
    assert len(rows) == 8 * len(run)
    for order in data['early 1 order']:
      assert order.shape == (40, 8)
      # each of them once, in an order of the seed's own
      assert sorted(order[run].reshape(-1)) == [*range(len(rows))]
    first, second = (order[run] for order in data['early 1 order'])
    assert (first != second).any()
    assert not more or (first[:5] != data['early 1 order'][0][more]).any()
    batches.append(rows[data['early 1 order'][:, run]])
  # a run is the same one, whatever trial there was
  np.testing.assert_array_equal(*batches)


def test_equal_scores_are_told_apart_by_loss_and_nan_loses():
  rows = [
    {'rate': 1, 'valid': 50.0, 'loss': 2.0},
    {'rate': 2, 'valid': 50.0, 'loss': 1.0},
    {'rate': 3, 'valid': None, 'loss': None},
  ]
  assert picking.pick(rows, (1, 2, 3))[0] == 2


@pytest.mark.slow
def test_compression_is_learned_out_of_the_last_token():
  size = mad.BASE['compression']._replace(V=4, L=4)
  made = mad.problem('compression', 'compression', size)
  training = dataclasses.replace(
    TRAINING, steps=120, rates=(1e-2,), batch=32, examples=512, tests=64
  )
  cfg = entrants.config('transformer', training.base(4))
  net = made.net(cfg)
  params = net.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  tokens = jnp.array([[0, 1, 2, 3]])
  logits = net.apply(params, tokens)
  assert logits.shape == (1, 4, 4)
  # the first token is seen, at every position of the answer
  other = net.apply(params, tokens.at[0, 0].set(1))
  assert (logits != other).all(-1).all()
  (row,) = trials.train(made, cfg, training, 1)
  assert row['scores']['accuracy'] > 70  # 62 of 100 know the last token alone
  word = 'hope:cms.blocks=all;cms.periods=(2,)'
  with pytest.raises(ValueError, match='which compression does not'):
    made.net(entrants.config(word, training.base(4)))


def test_a_step_is_timed_between_evaluations():
  assert sweep.step_ms([(10, 0.0), (20, 1.0), (40, 3.0)]) == 100.0
  assert sweep.step_ms([(10, 0.0)]) is None
  halves = [(10, 0.0), (40, 3.0), (10, 0.0), (20, 0.5), (40, 1.5)]
  assert sweep.step_ms(halves) == 150.0


@pytest.mark.parametrize(
  'steps,many,every',
  [(2000, 50, 40), (800, 24, 40), (1234, 50, 617), (9, 20, 1)],
)
def test_there_are_no_more_evaluations_than_asked_for(steps, many, every):
  assert sweep.stretch(steps, many) == every


def test_a_run_is_scored_at_its_end_or_where_it_was_best():
  found = [(10, 50.0, 1.0), (20, 90.0, 0.5), (30, 90.0, 0.4), (40, 60.0, 0.1)]
  rows = [
    {'rate': 0.1, 'seed': seed, 'step': step, 'valid': valid, 'loss': loss}
    for step, valid, loss in [*found, (40, None, None)]
    for seed in (0, 1)
    if (valid is None) <= seed
  ]
  Rule = picking.Rule
  last = picking.scored(rows, Rule())
  assert [(row['seed'], row['valid']) for row in last] == [(0, 60.0), (1, None)]
  for best, step in (('valid', 30), ('loss', 40)):
    found = picking.scored(rows, Rule(best))
    assert [(row['seed'], row['step']) for row in found] == [
      (0, step),
      (1, step),
    ]
  # the first that is enough; where there is none, as without
  for enough, steps in ((50.0, [10, 10]), (90.0, [20, 20]), (99.0, [40, 40])):
    found = picking.scored(rows, Rule('', enough))
    assert [row['step'] for row in found] == steps
    assert picking.all_ended(rows, Rule('', enough)) is (enough < 99)
  assert not picking.all_ended(rows, Rule())
  other = dict(rows[0], rate=0.2, valid=1.0)
  assert not picking.all_ended([*rows, other], Rule('', 50.0))


def test_a_run_that_gets_no_better_ends_and_what_comes_later_does_not_count():
  losses = [3.0, 2.0, 2.5, 2.2, 2.1, None, 1.0]
  run = [
    {'rate': 0.1, 'seed': 0, 'step': i, 'valid': 10.0 * i, 'loss': loss}
    for i, loss in enumerate(losses)
  ]
  for patience, end, step in ((1, 2, 1), (3, 4, 1), (4, 5, 1), (5, None, 6)):
    rule = picking.Rule('loss', 0.0, patience)
    ends = [rule.ended(run[: i + 1]) for i in range(len(run))]
    assert ends == [end is not None and i >= end for i in range(len(run))]
    assert picking.scored(run, rule)[0]['step'] == step
    better = [dict(row, seed=1, loss=9.0 - i) for i, row in enumerate(run)]
    assert not picking.all_ended(run + better, rule)
  # of those until it was enough
  assert picking.scored(run, picking.Rule('loss', 40.0))[0]['step'] == 1
  assert picking.scored(run, picking.Rule('valid', 40.0))[0]['step'] == 4


def test_training_refuses_what_does_not_go_together():
  for name, value, words in (
    ('best', True, "best=True: one of \\('', 'valid', 'loss'\\)"),
    ('patience', 3, "patience=3: .* only with best='valid'"),
    ('patience', -1, 'patience=-1: .* 0 or more'),
    ('warmup', 1.0, 'warmup=1.0: 0 or more, below 1'),
    ('b2', -0.1, 'b2=-0.1: 0 or more, below 1'),
    ('rates', (0.1, 0.01, 0.1), 'rates=.*: each of them once'),
  ):
    with pytest.raises(ValueError, match=words):
      dataclasses.replace(TRAINING, **{name: value})
