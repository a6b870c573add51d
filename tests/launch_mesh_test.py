"""Threads of simulated devices; meshes are tested by what runs on them."""

import os

import pytest
from absl import flags

from nestax.launch import bench, command
from nestax.launch import mesh as meshes

MANY = '--xla_cpu_max_isa=AVX2 --xla_force_host_platform_device_count=100'


def unset(monkeypatch, name):
  monkeypatch.setenv(name, '')  # so that it is taken back afterwards
  monkeypatch.delenv(name)


@pytest.mark.parametrize(
  'given,want',
  [
    ({}, None),
    ({'JAX_NUM_CPU_DEVICES': '1'}, None),
    ({'JAX_NUM_CPU_DEVICES': '100'}, '400'),
    ({'XLA_FLAGS': MANY}, '400'),
    ({'JAX_NUM_CPU_DEVICES': '100', 'NPROC': '3'}, '3'),
  ],
)
def test_simulated_devices_get_threads_to_wait_in(monkeypatch, given, want):
  for name in ('JAX_NUM_CPU_DEVICES', 'XLA_FLAGS', 'NPROC'):
    unset(monkeypatch, name)
  for name, value in given.items():
    monkeypatch.setenv(name, value)
  meshes.spare_threads()
  assert os.environ.get('NPROC') == want


@pytest.mark.parametrize('start', ['command', 'bench'])
def test_commands_see_to_it(monkeypatch, start):
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '100')
  unset(monkeypatch, 'NPROC')
  if start == 'command':
    command.parser('x', 'X.', flags.FlagValues())(['x'])
  else:
    monkeypatch.setattr('nestax.launch.benches.optim.main', lambda: None)
    assert bench.main(['nestax-bench', 'optim']) == 0
  assert os.environ['NPROC'] == '400'
