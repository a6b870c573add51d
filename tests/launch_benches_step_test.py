"""nestax-bench step times the training step that nestax-train makes."""

import jax
import pytest

from nestax.launch.benches import step

TINY = [
  'model.family=hope_attention',
  'model.V=32',
  'model.D=16',
  'model.H=1',
  'model.F=32',
  'model.N=1',
  'model.memory.chunk_mem=8',
  'model.memory.chunk_rest=8',
  'model.cms.periods=(8,)',
  'mesh.data=1',
  'optimizer=adamw',
]


@pytest.fixture(scope='module')
def table():
  made = step.cases(
    ['tiny'], TINY, ['16', '32'], ['frozen', 'first_order'], 'all', batch=2
  )
  del made[step.Case('tiny', 'first_order', 32)]
  rows, _ = step.measure(made, repeats=2, peer='tiny', peak_flops=1e9)
  return {row['name']: row for row in rows}


def test_ratios_and_rates_are_of_the_times(table):
  row, frozen = table['tiny first_order 16'], table['tiny frozen 16']
  assert row['tokens/s'] == pytest.approx(2 * 16 / row['ms'] * 1e3)
  assert row['time / frozen'] == pytest.approx(row['ms'] / frozen['ms'])
  assert row['speed / tiny'] == pytest.approx(frozen['ms'] / row['ms'])
  assert frozen['time / frozen'] == frozen['speed / tiny'] == 1


def test_mfu_counts_the_frozen_model(table):
  row, frozen = table['tiny first_order 16'], table['tiny frozen 16']
  assert row['MFU'] * row['ms'] == pytest.approx(frozen['MFU'] * frozen['ms'])


def test_longer_rows_need_more_memory(table):
  frozen = [table[f'tiny frozen {length}'] for length in (16, 32)]
  assert 0 < frozen[0]['peak GiB'] < frozen[1]['peak GiB']


def test_a_step_trains(table):
  del table  # compiled before: this test is about what a step does
  ((config, cfg),) = step.cases(
    ['tiny'], [*TINY, 'model.family=transformer'], ['8'], ['full'], '', 2
  ).values()
  assert not cfg.stream, 'a Transformer is only timed frozen'
  run = step.prepare(config, cfg, keep=True, documents=4).run
  losses = [float(run()['loss']) for _ in range(20)]
  assert losses[-1] < losses[0]


def test_without_repeats_nothing_runs(monkeypatch):
  made = step.cases(['tiny'], TINY, ['8'], ['frozen'], '', 2)

  def refuse(*args):
    raise AssertionError('a state was made')

  monkeypatch.setattr(step.steps, 'init_state', refuse)
  (row,), dearest = step.measure(made, 0, 'tiny', 0.0, top=3)
  assert not dearest
  assert row['ms'] is None and row['MFU'] is None
  assert row['peak GiB'] > 0 and row['compile s'] > 0


def test_targets_are_not_the_tokens():
  batch = step.random_batch(step.ModelConfig(), 2, 64)
  assert (batch['tokens'] != batch['targets']).mean() > 0.9
  assert jax.tree.leaves(batch)[0].shape == (2, 64)


def test_documents_have_the_length_that_is_asked_for():
  cfg = step.ModelConfig()
  assert step.random_batch(cfg, 2, 64)['reset'] is None
  starts = step.random_batch(cfg, 8, 4096, documents=64)['reset']
  assert starts.shape == (8, 4096)
  assert starts.mean() == pytest.approx(1 / 64, rel=0.15)


def test_attention_is_counted_inside_documents():
  assert step.read_length(2, 64, 0) == 64
  # every token a document of its own, which sees itself
  assert step.read_length(2, 64, 1) == 1
  # with starts that are as likely everywhere, the mean age is that of a token
  # far from the row's start
  assert step.read_length(8, 4096, 64) == pytest.approx(2 * 64, rel=0.1)


@pytest.mark.parametrize('length', ['0', '-8', 'long'])
def test_lengths_that_are_none_are_refused(length):
  with pytest.raises(ValueError, match='--length=' + length):
    step.cases(['tiny'], TINY, [length], ['frozen'], 'all', 2)
