"""Whole steps compiled ahead of time, on this machine as eight devices.

For TPUs see `launch_compile_test`.
"""

import collections
import functools
import math

import jax
import pytest
from launch_cases import make_config

from nestax.launch import ahead, chips, costs, fit, hlo, prepare
from nestax.launch.mesh import MeshError

PEAKS = chips.Peaks(1e12, 2.0**30, 1e11, 1e10)


def config_of(family='transformer', **mesh):
  config = make_config('none', family)
  config.mesh.update({'data': 1} | mesh)
  config.train.batch = 8
  # no size twice: an array can be told by its shape
  config.model.update({'D': 16, 'F': 40, 'N': 3, 'H': 2, 'V': 24})
  return config


@pytest.mark.parametrize(
  'family,options,tried',
  [
    ('hope', {'momentum': True}, ['pallas', '']),
    ('hope', {'depth_mem': 2}, ['pallas', '']),
    ('hope', {'chunk_mem': 4, 'chunk_rest': 4}, ['']),
    ('titans', {}, ['pallas', '']),
    ('titans_mac', {}, ['']),
    ('transformer', {}, ['']),
  ],
)
def test_kernels_are_tried_for_tpus_where_they_cover_the_rule(
  family, options, tried
):
  config = config_of(family)
  config.model.memory.update({'chunk_mem': 8, 'chunk_rest': 8} | options)
  assert ahead._implementations(config, 'tpu', serve=False) == tried
  assert ahead._implementations(config, 'cpu', serve=False) == ['']


@functools.cache
def trained():
  config = config_of(data=2, fsdp=4)
  config.optimizer = 'm3'
  config.opt.ns_steps = 1
  config.model.remat = 'dots'  # else gathered weights are kept, as others are
  return ahead.compile_step(config, ahead.devices('cpu:8'))


def test_the_report_is_of_one_device():
  made = trained()
  row = fit.report(made, 'cpu:8', PEAKS)
  plan = made.plan
  whole = sum(x.size for x in jax.tree.leaves(made.state.params))
  gib = row['params GiB'] * 2**30
  # all but vectors such as norms are in four parts
  assert whole < gib < 1.2 * whole
  assert 2 <= row['optimizer GiB'] / row['params GiB'] <= 3
  assert (row['mesh'], row['devices']) == ('data=2 fsdp=4', 8)
  assert row['tokens'] == 8 * plan.config.data.length
  assert row['loops not read'] == 0 and row['memory by'] == 'none'
  assert 0.3 < row['useful'] < 1
  assert row['usual TFLOP'] < row['TFLOP']
  assert row['step ms'] == max(
    row[f'{k} ms'] for k in ('compute', 'HBM', 'ICI')
  )
  assert row['tokens/s'] == pytest.approx(row['tokens'] / row['step ms'] * 1e3)
  parts = ('params', 'optimizer', 'memories', 'activations', 'rest')
  total = sum(row[f'{part} GiB'] for part in parts)
  assert row['total GiB'] == pytest.approx(total) and row['rest GiB'] >= 0
  assert row['fits'] and 'It fits' in fit.verdict(row)


def test_what_does_not_fit_is_said():
  row = fit.report(trained(), 'cpu:8', PEAKS._replace(memory=1000.0))
  assert row['fits'] is False and 'does not fit' in fit.verdict(row)
  row = fit.report(trained(), 'cpu:8', None)
  assert row['fits'] is None and 'give --peaks' in fit.verdict(row)
  refused = trained()._replace(
    program=None, refused='Used 25.50G of 15.75G hbm'
  )
  row = fit.report(refused, 'v5e:16x16', chips.PEAKS['v5e'])
  assert row['total GiB'] == 25.5
  assert fit.verdict(row) == 'It does not fit: 25.50 GiB of 16 GiB.'


def whole_states(made) -> list[str]:
  """What makes an array of the whole of a sharded state of the optimiser."""
  shapes = {
    (leaf.dtype.itemsize, tuple(sorted(leaf.shape)))
    for leaf in jax.tree.leaves(made.state.opt_state)
    if leaf.ndim > 2 and math.prod(leaf.shape) > 500
  }
  assert shapes
  module = hlo.parse(made.program.as_text())
  return [
    one.name
    for body in module.computations.values()
    for one in body.instructions.values()
    for array in one.arrays
    if array.dtype.startswith(('f', 'bf'))
    and (array.bytes / math.prod(array.shape), tuple(sorted(array.shape)))
    in shapes
  ]


def test_no_state_of_the_optimiser_is_gathered_whole():
  assert whole_states(trained()) == []


def test_gradients_are_scattered_along_fsdp_as_they_are_summed():
  """Summed in parts along data, and nowhere over all devices at once."""
  module = hlo.parse(trained().program.as_text())
  summed = collections.Counter()
  for body in module.computations.values():
    for one in body.instructions.values():
      if one.opcode not in ('all-reduce', 'reduce-scatter'):
        continue
      size = costs.group_size(module, one)
      # what is summed, not the part of it that is kept
      ways = size if one.opcode == 'reduce-scatter' else 1
      counts = [math.prod(array.shape) for array in one.arrays]
      summed[size] += ways * sum(n for n in counts if n > 16)
  assert summed[8] == summed[1] == 0, summed
  # a fourth of all weights along data, all of them along fsdp
  assert summed[4] == 4 * summed[2] > 3 * 16 * 40, summed


def test_decoding_keeps_its_state_in_shards():
  config = config_of('hope_attention', data=8)
  made = ahead.compile_step(config, ahead.devices('cpu:8'), serve=True)
  row = fit.report(made, 'cpu:8', PEAKS)
  states = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(made.state.memory)
  )
  assert row['memories GiB'] * 2**30 == states / 8
  assert (row['step'], row['tokens']) == ('decode', 8)
  assert row['optimizer GiB'] == 0 and row['all-to-all GB'] == 0


@pytest.mark.parametrize(
  'topology, words',
  [
    ('cpu:x', 'write it as cpu:8'),
    ('v9:2x2', 'v9:2x2: one of'),
    ('', 'one of'),
  ],
)
def test_a_topology_that_is_none_is_refused(topology, words):
  with pytest.raises(ahead.AheadError, match=words):
    ahead.settle(topology)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(ahead.tpu, 'available', lambda: False)
  monkeypatch.setattr(ahead.os, 'environ', {})
  with pytest.raises(ahead.AheadError, match='no libtpu'):
    ahead.settle('v5e:4x4')


def test_more_devices_than_there_are_are_refused():
  with pytest.raises(ahead.AheadError, match='has 8 CPU devices'):
    ahead.devices('cpu:9')


def test_a_batch_that_does_not_divide_is_refused():
  config = config_of(data=8)
  config.train.batch = 12
  with pytest.raises(MeshError, match='12 rows'):
    ahead.compile_step(config, ahead.devices('cpu:8'))


def test_a_plan_without_a_workdir_reads_no_data():
  plan = prepare.compose(config_of(data=2))
  assert plan.workdir is None and plan.mesh.size == 2


def test_an_effort_reaches_the_compiler(monkeypatch):
  asked = []

  class Lowered:
    def compile(self, compiler_options=None):
      asked.append(compiler_options)

  monkeypatch.setattr(ahead, '_train', lambda plan: (None, Lowered()))
  for effort in ('', 'O1'):
    ahead.compile_step(config_of(data=2), ahead.devices('cpu:8'), effort=effort)
  names = ('optimization_level', 'memory_fitting_level')
  assert asked == [None, dict.fromkeys(names, 19)]
  # those are names that it knows
  ahead.jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=asked[1])
  with pytest.raises(ahead.AheadError, match='effort 2: one of O0, O1'):
    ahead.compile_step(config_of(data=2), ahead.devices('cpu:8'), effort='2')
