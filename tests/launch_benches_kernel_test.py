"""nestax-bench kernel times the recurrence and attention at equal tokens."""

import numpy as np
import pytest

from nestax.launch.benches import kernel
from nestax.models.memory import cost

SHAPE = kernel.Shape(1, 32, 2, 8, 'float32')


@pytest.fixture(scope='module')
def rows():
  table = kernel.measure(
    kernel.rule(8, []), SHAPE, ['scan', 'pallas', 'attention'], repeats=2
  )
  return {row['name']: row for row in table}


def test_every_implementation_is_timed_both_ways(rows):
  assert len(rows) == 6
  for row in rows.values():
    name, part = row['name'].split()
    peer = rows[f'attention {part}']
    assert row['/ attention'] == pytest.approx(row['ms'] / peer['ms'])
    flops, moved = kernel.work(
      kernel.rule(8, []), SHAPE, name == 'attention', part == 'both'
    )
    assert row['TFLOP/s'] * 1e12 * row['ms'] / 1e3 == pytest.approx(flops)
    assert row['GB/s'] * 1e9 * row['ms'] / 1e3 == pytest.approx(moved)
    assert row['floor ms'] is None, 'the peaks of a CPU are not known'


def test_calls_are_timed_in_a_row(monkeypatch):
  asked = []

  def interleaved(runs, repeats):
    asked.extend(run() for run in runs.values())
    return {name: np.full((repeats, 1), 0.06) for name in runs}

  def count(args, *g):
    asked.append('call')

  monkeypatch.setattr(kernel.timing, 'interleaved', interleaved)
  monkeypatch.setattr(kernel.jax, 'jit', lambda f: count)
  table = kernel.measure(kernel.rule(8, []), SHAPE, ['scan'], repeats=3)
  assert len(asked) == 2 * kernel.CALLS + 2
  assert [row['ms'] for row in table] == [60 / kernel.CALLS] * 2


def test_work_is_of_all_heads_and_passes():
  cfg = kernel.rule(8, [])
  forward, both = (kernel.work(cfg, SHAPE, False, b) for b in (False, True))
  assert forward[0] == 64 * cost.flops_per_token(cfg, 8)
  assert both[0] == 3 * forward[0]
  assert forward[1] == 64 * (3 * 8 * 4 + 4 * 8)
  attention, _ = kernel.work(cfg, SHAPE, True, False)
  assert attention == 2 * 32**2 / 2 * 2 * 2 * 8


def test_the_floor_is_the_slower_of_arithmetic_and_memory(monkeypatch):
  cfg, shape = kernel.rule(8, []), SHAPE._replace(dtype='bfloat16')
  flops, moved = kernel.work(cfg, shape, False, False)
  times = {'scan forward': 1.0}
  monkeypatch.setattr(kernel.metrics, 'peak_flops', lambda kind: flops)
  monkeypatch.setattr(kernel, 'peak_bytes', lambda kind: moved / 3)
  row = kernel._row(cfg, shape, 'scan forward', times)
  assert row['floor ms'] == pytest.approx(3e3)
  assert row['/ attention'] is None


@pytest.mark.parametrize(
  'words,said',
  [
    ('momentum=yes', 'momentum is a bool'),
    ('depth=2', "no key 'rule.depth'"),
    ('eta_max=2', 'eta_max=2'),
  ],
)
def test_a_rule_that_cannot_be_is_refused(words, said):
  with pytest.raises(ValueError, match=said):
    kernel.rule(8, [words])


def test_gates_are_handed_in():
  words = ['adaptive=()', 'generated=False', 'given=("eta","alpha")']
  cfg = kernel.rule(8, words)
  args, g = kernel._inputs(cfg, SHAPE)
  run = kernel.functions(cfg, SHAPE, ['scan'])['scan']
  assert kernel.jax.eval_shape(run, *args).shape == g.shape
  assert list(args[0]) == ['mem']


def test_rules_are_changed():
  rule = kernel.rule(16, ['momentum=True', 'depth_mem=2', 'eta_max=1'])
  assert rule.momentum and rule.deep == ('mem',) and rule.eta_max == 1.0
  assert rule.chunks == (16, 16)
  initial = kernel.initial_values(rule, 2, 8, kernel.jax.random.key(0))
  assert initial['mem']['inner'].shape == (2, 32, 8)
