"""MAD's settings are the benchmark's."""

import dataclasses

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
  assert counts['memorization'] == 6 and 'memorization' in hard['memorization']
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
