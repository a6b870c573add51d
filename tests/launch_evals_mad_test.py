"""MAD's settings are the benchmark's."""

import dataclasses

import pytest

from nestax.launch.evals import mad, suite, trials


def test_the_sizes_are_the_benchmarks():
  options = mad.EVALUATION.options
  found = mad.settings(options)
  assert [name for _, name in found] == list(mad.BASE)
  assert found['selective copying', 'selective copying'].L == 256
  every = mad.settings(dataclasses.replace(options, harder=True))
  # 1 + 3 + 3 + 4; noise has 3 shares more, copying 3 numbers and a length less
  assert len(every) == 3 * 11 + 14 + 13 + 6
  hard = mad.groups(dataclasses.replace(options, harder=True))
  counts = {task: len(names) for task, names in hard.items()}
  assert list(counts) == list(mad.BASE) and sum(counts.values()) == len(every)
  assert counts['memorization'] == 6
  # a setting has a name of its own, so that --tasks can ask for it alone
  assert hard['memorization'][0] == 'memorization, base'
  assert not set(hard) & {name for names in hard.values() for name in names}
  assert mad.groups(options) == {}
  cells = [*mad.cells(options, suite.Asked(('transformer',)))]
  steps = [cell.key['training']['steps'] for cell in cells]
  assert steps == [20_000] * 5 + [400]
  for epochs in (200, 25):
    hard = dataclasses.replace(options, harder=True, epochs=epochs)
    for cell in mad.cells(hard, suite.Asked(('transformer',))):
      train = trials.Training(**cell.key['training'])
      epoch = -(-cell.key['size']['rows'] // train.batch)
      assert train.every == epoch  # as often as the benchmark looks
  assert not any(cell.key['config']['tied'] for cell in cells)
  shorter = suite.Asked(('transformer',), steps=7)
  assert next(mad.cells(options, shorter)).key['training']['steps'] == 7


@pytest.mark.parametrize(
  'patience, evaluations, epochs, steps, want',
  [
    (20, 200, 200, 0, 20),  # what keys held before it was counted in epochs
    (20, 50, 200, 0, 5),
    (3, 50, 200, 0, 1),
    (20, 200, 25, 0, 20),
    (20, 200, 201, 0, 15),  # evaluations 134 steps apart
    (20, 200, 200, 2000, 200),
    (0, 50, 200, 0, 0),
  ],
)
def test_patience_counts_epochs(patience, evaluations, epochs, steps, want):
  train = dataclasses.replace(
    mad.Options().train, patience=patience, evaluations=evaluations
  )
  options = mad.Options(epochs=epochs, train=train)
  cell = next(mad.cells(options, suite.Asked(('transformer',), steps=steps)))
  made = trials.Training(**cell.key['training'])
  assert made.patience == want
  epoch = cell.key['size']['rows'] // made.batch
  # in whole evaluations, and no sooner than asked
  short = made.patience * made.every - patience * epoch
  assert 0 <= short < made.every
