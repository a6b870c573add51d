"""The loop: learns, resumes to the bit, stops in words, leaves what it says."""

import json
import os
import re
import shutil
import signal

import jax
import launch_cases as cases
import numpy as np
import pytest

from nestax.launch import checkpoint, metrics, plots, run
from nestax.launch import step as steps


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return cases.write_corpus(tmp_path_factory.mktemp('corpus'))


def train(workdir, config):
  """Runs to the end; gives the rows of the metrics."""
  run.train(run.prepare(config, workdir))
  return metrics.read(workdir / 'metrics.jsonl')


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
  """An uninterrupted run of four steps: its workdir and rows."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, train(workdir, cases.make_config(corpus))


@pytest.fixture(autouse=True)
def undrawn(whole, monkeypatch):
  """Runs but the whole one draw nothing."""
  monkeypatch.setattr(plots, 'loss_curve', lambda *_: None)


def state_of(workdir, config):
  """The arrays of the newest checkpoint, on the host."""
  plan = run.prepare(config, workdir)
  memory = plan.memory and (lambda: plan.memory(config.train.batch))
  abstract = steps.abstract_state(plan.model, plan.tx, plan.mesh, memory)
  checkpoints = checkpoint.Checkpoints(workdir, config, lambda line: None)
  data = run.pipeline.train_iterator(config)
  state = checkpoints.restore(abstract, data)
  checkpoints.close()
  state = state._replace(key=jax.random.key_data(state.key))
  return jax.device_get(state), data.get_state()


def assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_run_leaves_what_it_says(whole):
  workdir, rows = whole
  assert [row['step'] for row in rows] == [1, 2, 2, 3, 4, 4]
  assert {p.name for p in workdir.iterdir()} == {
    '.lock',
    'checkpoints',
    'loss.png',
    'metrics.jsonl',
    'tensorboard',
  }
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['2', '4']


def test_the_first_loss_is_that_of_a_guess(whole):
  _, rows = whole
  assert rows[0]['loss'] == pytest.approx(np.log(272), rel=0.05)


def test_rows_say_where_the_time_went(whole):
  _, rows = whole
  for row in rows:
    if row['split'] == 'train':
      parts = {k: v for k, v in row.items() if k.startswith('time_')}
      assert sum(parts.values()) == pytest.approx(1)
  first, second, third, _ = (row for row in rows if row['split'] == 'train')
  assert first['time_compile'] > second['time_compile'] == 0
  assert third['time_evaluate'] > 0 and third['time_checkpoint'] > 0


def cut(workdir, at):
  """A copy of a finished run as it would be, had it been killed after step 3.

  Its newest checkpoint is that of step 2, its metrics go one step further.
  """
  shutil.copytree(workdir, at, ignore=shutil.ignore_patterns('4', '*.png'))
  rows = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
  (at / 'metrics.jsonl').write_text(''.join(rows[:4]))
  return at


def assert_resumed(resumed, whole, config):
  for split in ('train', 'valid'):
    got, want = (
      cases.curve(metrics.read(at / 'metrics.jsonl'), split)
      for at in (resumed, whole)
    )
    assert got == want
  got, want = (state_of(at, config) for at in (resumed, whole))
  assert_same(got[0], want[0])
  assert got[1] == want[1]


def test_two_steps_and_two_more_equal_four(whole, corpus, tmp_path, capsys):
  config = cases.make_config(corpus)
  resumed = cut(whole[0], tmp_path / 'cut')
  train(resumed, config)
  assert_resumed(resumed, whole[0], config)
  said = capsys.readouterr().out
  assert re.search(r'of it: .*\d% other', said) and 'nothing to' not in said


def test_carried_memory_goes_on_where_it_was(corpus, tmp_path):
  config = cases.make_config(corpus)
  config.train.carry_state = True
  train(tmp_path / 'whole', config)
  resumed = cut(tmp_path / 'whole', tmp_path / 'cut')
  train(resumed, config)
  assert_resumed(resumed, tmp_path / 'whole', config)
  assert jax.tree.leaves(state_of(resumed, config)[0].memory)


@pytest.mark.parametrize('asked', [3, 4])
def test_a_finished_run_is_left_as_it_is(asked, whole, corpus, capsys):
  workdir, rows = whole
  config = cases.make_config(corpus)
  config.train.steps = asked
  assert train(workdir, config) == rows
  said = capsys.readouterr().out
  assert 'step 4 of 4' in said and 'bigram entropy' in said
  assert f'has 4 steps already, and train.steps={asked}; more of them' in said
  assert 'of it:' not in said


def test_another_mesh_and_microbatches_go_on_with_the_run(
  whole, corpus, tmp_path
):
  config = cases.make_config(corpus)
  config.mesh.update({'data': 2, 'tensor': 2})
  config.train.accumulate = 2
  config.profile.update({'start': 3, 'steps': 1})
  rows = train(cut(whole[0], tmp_path / 'cut'), config)
  assert list((tmp_path / 'cut' / 'profile').rglob('*.xplane.pb'))
  got, want = (cases.curve(r)[-1] for r in (rows, whole[1]))
  np.testing.assert_allclose(got, want, 1e-5)


@pytest.fixture
def spoiled(monkeypatch):
  """Makes the weights of the given batches NaN, counted from 1."""

  def spoil(*numbers):
    made = run.pipeline.train_iterator

    def train_iterator(config, rows=None):
      data = made(config, rows)
      inner, count = type(data).__next__, [0]

      class Spoiled(type(data)):
        def __next__(self):
          count[0] += 1
          batch = dict(inner(self))
          if count[0] in numbers:
            batch['weights'] = batch['weights'] * np.nan
          return batch

      data.__class__ = Spoiled
      return data

    monkeypatch.setattr(run.pipeline, 'train_iterator', train_iterator)

  return spoil


def test_a_bad_step_is_counted_and_gone_over(corpus, tmp_path, spoiled):
  spoiled(2)
  rows = train(tmp_path, cases.make_config(corpus))
  rows = [row for row in rows if row['split'] == 'train']
  assert [row['skipped'] for row in rows] == [0, 1, 1, 1]
  assert rows[1]['loss'] is None and rows[2]['loss'] is not None
  # not at step 2, the bad one
  assert os.listdir(tmp_path / 'checkpoints') == ['4']


def test_a_run_that_ends_with_a_bad_step_keeps_the_good_ones_before(
  corpus, tmp_path, spoiled
):
  spoiled(4)
  config = cases.make_config(corpus)
  train(tmp_path, config)
  state, _ = state_of(tmp_path, config)
  assert (state.step, state.skipped, state.bad) == (4, 1, 1)


def test_bad_steps_in_a_row_stop_the_run_with_the_last_good_checkpoint(
  corpus, tmp_path, spoiled
):
  spoiled(3, 4)
  config = cases.make_config(corpus)
  with pytest.raises(run.BadSteps, match='2 steps in a row up to step 4'):
    train(tmp_path, config)
  assert os.listdir(tmp_path / 'checkpoints') == ['2']
  state, _ = state_of(tmp_path, config)
  assert state.step == 2 and state.bad == 0


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(
  whole, corpus, tmp_path, monkeypatch, number
):
  config = cases.make_config(corpus)
  put, count = run.meshes.put, [0]

  def put_and_kill(mesh, batch, part):
    count[0] += 1
    if count[0] == 3:
      os.kill(os.getpid(), number)
    return put(mesh, batch, part)

  monkeypatch.setattr(run.meshes, 'put', put_and_kill)
  config.eval.every = 0
  config.checkpoint.every = 0
  before = signal.getsignal(number)
  with pytest.raises(run.Interrupted, match='saved checkpoint 3') as stop:
    train(tmp_path, config)
  assert stop.value.exit_code == 128 + number
  assert signal.getsignal(number) is before
  monkeypatch.setattr(run.meshes, 'put', put)
  rows = train(tmp_path, config)
  assert cases.curve(rows) == cases.curve(whole[1])


def test_a_save_that_fails_ends_the_run_in_words(corpus, tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, os.strerror(28))

  manager = checkpoint.ocp.CheckpointManager
  monkeypatch.setattr(manager, 'save', full)
  words = 'checkpoint 2 could not be written .*No space left on device'
  with pytest.raises(checkpoint.CheckpointError, match=words):
    train(tmp_path, cases.make_config(corpus))


def test_the_checkpoint_of_another_config_is_refused(whole, corpus):
  config = cases.make_config(corpus)
  config.model.D = 16
  words = 'model.D is 8 there and 16 here'
  with pytest.raises(checkpoint.OtherConfigError, match=words):
    run.train(run.prepare(config, whole[0]))


def test_the_data_of_another_corpus_is_refused(tmp_path):
  folder = tmp_path / 'corpus'
  config = cases.make_config(cases.write_corpus(folder))
  train(tmp_path / 'run', config)
  (folder / '07.txt').write_text('something else ' * 9)
  with pytest.raises(checkpoint.OtherConfigError, match='corpus'):
    train(tmp_path / 'run', config)
  assert not (tmp_path / 'run' / 'damaged').exists()


def test_a_sample_is_written_at_the_end(whole, corpus):
  config = cases.make_config(corpus)
  config.log.update({'sample_tokens': 3, 'prompt': 'memory'})
  train(whole[0], config)
  assert (whole[0] / 'sample.txt').read_text().startswith('memory')


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('train.steps', 0, 'train.steps is 0'),
    ('train.accumulate', 3, 'train.batch = 4 rows'),
    ('model.H', 3, 'D=8 is not a multiple of H=3'),
    ('model.V', 100, "model's vocabulary only 100"),
    ('model.cms.periods', (8, 12), 'level periods'),
    ('mesh.data', 8, '8 devices along data'),
    ('optimizer', 'adam', "optimizer is 'adam'"),
    ('data.path', '/nowhere/*.txt', '/nowhere'),
    ('checkpoint.keep', 0, 'checkpoint.keep is 0'),
    ('checkpoint.keep_every', 3, 'a multiple of checkpoint.every, which is 2'),
    ('data.shards', 3, 'train.batch=4 is not a multiple of data.shards=3'),
  ],
)
def test_a_bad_value_is_refused_before_anything_is_made(
  corpus, tmp_path, key, value, words
):
  config = cases.make_config(corpus, 'hope')
  *groups, name = key.split('.')
  group = config
  for part in groups:
    group = group[part]
  group[name] = value
  with pytest.raises((ValueError, OSError), match=words):
    run.prepare(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_rows_are_json(whole):
  for line in (whole[0] / 'metrics.jsonl').read_text().splitlines():
    assert json.loads(line, parse_constant=pytest.fail)['step']


def test_a_device_without_room_ends_the_run_in_words(
  corpus, tmp_path, monkeypatch
):
  plan = run.prepare(cases.make_config(corpus), tmp_path)
  words = 'RESOURCE_EXHAUSTED: Out of memory allocating 37067674760 bytes.'

  def full(plan):
    raise jax.errors.JaxRuntimeError(words)

  monkeypatch.setattr(run, '_train', full)
  at_once = r'34\.5 GiB at once\. .*train\.accumulate=2 .*model\.remat=full'
  with pytest.raises(run.FAILURES, match=at_once):
    run.train(plan)
  # no advice that would be refused, or has been taken
  plan.config.train.accumulate, plan.config.model.remat = 4, 'full'
  only = (
    r'needed by fewer rows \(train.batch\) or shorter rows \(data.length\);'
  )
  with pytest.raises(run.OutOfMemory, match=only):
    run.train(plan)
  # of a memory, where rows have more chunks than a GPU takes at once
  hope = run.prepare(cases.make_config(corpus, 'hope'), tmp_path / 'hope')
  for length, changes, advised in (
    (16 * 8 + 1, {}, True),
    (16 * 8, {}, False),
    (16 * 8 + 1, {'stride': 2}, False),
    (16 * 8 + 1, {'stride': 1, 'implementation': 'token'}, False),
  ):
    hope.config.data.length = length
    hope.config.model.memory.update(changes)
    with pytest.raises(run.OutOfMemory) as caught:
      run.train(hope)
    assert ('model.memory.stride=4' in str(caught.value)) == advised
  words = (  # of an L40, where Hope's kernels were asked for
    'RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 129048, '
    'available: 101376, context: []'
  )
  scanned = 'asks for 129048 bytes .* has 101376: .*implementation=scan'
  with pytest.raises(run.OutOfMemory, match=scanned):
    run.train(plan)
  words = 'INTERNAL: something else'
  with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
    run.train(plan)


def test_levels_that_no_row_trains_are_named(corpus, tmp_path):
  config = cases.make_config(corpus, 'hope')
  config.model.cms.blocks = 'all'
  config.model.cms.periods = (8, 16, 64)
  for length, words in ((16, '16, 64'), (24, '64'), (72, '')):
    config.data.length = length
    assert run._untrained(run.prepare(config, tmp_path)) == words
  config.train.carry_state, config.data.length = True, 16
  assert not run._untrained(run.prepare(config, tmp_path))
  config.model.cms.blocks, config.train.carry_state = 'none', False
  assert not run._untrained(run.prepare(config, tmp_path))
