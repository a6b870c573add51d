"""Threads of simulated devices; meshes are tested by what runs on them."""

import os

import pytest

from nestax.launch import mesh as meshes

MANY = '--xla_cpu_max_isa=AVX2 --xla_force_host_platform_device_count=100'


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
    monkeypatch.delenv(name, raising=False)
  for name, value in given.items():
    monkeypatch.setenv(name, value)
  meshes.spare_threads()
  assert os.environ.get('NPROC') == want
