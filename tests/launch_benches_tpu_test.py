"""The kernels compile for TPUs, ahead of time, at the recorded cost.

Needs libtpu (`pip install '.[tpu]'`, or TPU_LIBRARY_PATH=.../libtpu.so);
without it the compilations are skipped. To record the counts of today in
tests/tpu_bundles.json: `python tests/launch_benches_tpu_test.py`.
"""

import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from nestax.launch.benches import kernel, tpu
from nestax.models.memory.types import MemoryConfig

GOLDEN = pathlib.Path(__file__).with_name('tpu_bundles.json')
TOPOLOGIES = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
RULES = {
  '': {},
  'momentum': {'momentum': True},
  'deep': {'depth_mem': 2},
  # with documents beside, see `counts`
  'zero, given': {
    'anchor': 'zero',
    'adaptive': ('k', 'v'),
    'given': ('eta', 'alpha'),
  },
}
# a topology, the size of heads and chunks and the rule
CASES = [
  *itertools.product(TOPOLOGIES, ('64', '128')),
  ('v5e:2x2', '64 momentum'),
  ('v5e:2x2', '128 momentum'),
  ('v5e:2x2', '64 deep'),
  ('v5e:2x2', '128 deep'),
  ('v5e:2x2', '64 zero, given'),
]
# Each generation has another size among the quick ones.
SLOW = [
  ('v5e:2x2', '128 momentum'),
  ('v5p:2x2x1', '128'),
  ('v6e:2x2', '64'),
  ('v5e:2x2', '128 deep'),
  ('v5e:2x2', '64 zero, given'),
]
TOLERANCE = 0.05
needs_libtpu = pytest.mark.skipif(
  not tpu.available(),
  reason="no libtpu to compile with: pip install '.[tpu]' or TPU_LIBRARY_PATH",
)


def compiler() -> str:
  """The version of libtpu; '' for one that no package brought."""
  try:
    return importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    return ''


def counts(topology: str, name: str) -> dict[str, list[int]]:
  """Kernel -> [bundles, cycles, spills] of one grid step, of one of CASES."""
  size, _, rule = name.partition(' ')
  size = int(size)
  shape = kernel.Shape(1, 4 * size, 4, size, 'bfloat16')
  cfg = MemoryConfig(chunk_mem=size, chunk_rest=size, **RULES[rule])
  found = tpu.count(topology, cfg, shape, documents=rule == 'zero, given')
  return {
    name: [of.bundles, of.cycles, of.spills] for name, of in found.items()
  }


@needs_libtpu
@pytest.mark.parametrize(
  'topology,name',
  [
    pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ())
    for case in CASES
  ],
)
def test_kernels_compile_at_the_recorded_cost(topology, name):
  golden = json.loads(GOLDEN.read_text())
  if golden['libtpu'] != compiler():
    pytest.skip(f'recorded by libtpu {golden["libtpu"]}, not {compiler()!r}')
  golden = golden[topology][name]
  found = counts(topology, name)
  assert found.keys() == golden.keys()
  for of, (*got, _) in found.items():
    assert got == pytest.approx(golden[of][:2], rel=TOLERANCE), (
      f'{of} for {topology}, {name}: {golden[of][:2]} bundles and cycles '
      'recorded; if a change is meant, record it (see above)'
    )


@needs_libtpu
def test_walking_chunks_again_costs_a_forward_pass():
  shape = kernel.Shape(1, 512, 2, 64, 'bfloat16')
  ones = tpu.count('v5e:2x2', MemoryConfig(), shape)
  found = tpu.count('v5e:2x2', MemoryConfig(stride=4), shape)
  back, there = ones['memory_backward'], ones['memory_forward_saving']
  again = found['memory_backward'].bundles - back.bundles
  assert 0.4 * there.bundles < again < 1.1 * there.bundles


@needs_libtpu
def test_heads_of_256_fit():
  shape = kernel.Shape(1, 256, 1, 256, 'bfloat16')
  tpu.count('v5e:2x2', MemoryConfig(chunk_mem=128, chunk_rest=128), shape)


ATTENTION = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from nestax.models import fresh_attention

L = 8192
device = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
mesh = jax.make_mesh(
  (1,), ('data',), (jax.sharding.AxisType.Auto,), devices=device.devices[:1]
)
where = jax.NamedSharding(mesh, jax.P())
q = jax.ShapeDtypeStruct((2, L, 4, 64), jnp.bfloat16, sharding=where)
k = jax.ShapeDtypeStruct((2, L, 2, 64), jnp.bfloat16, sharding=where)
start = jax.ShapeDtypeStruct((2, L), jnp.int32, sharding=where)

def loss(q, k, v, start):
  y = fresh_attention.read(0, True, q, k, v, start, None)
  return jnp.sum(y.astype(jnp.float32))

with jax.set_mesh(mesh):
  step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, start).compile()
assert step.as_text().count('%splash_mha') >= 3
assert f'{L},{L}' not in step.as_text()
"""


@needs_libtpu
def test_attention_over_documents_compiles_in_blocks():
  subprocess.run(
    [sys.executable, '-c', ATTENTION],
    env=os.environ | tpu.settings('v5e:2x2'),
    check=True,
  )


@needs_libtpu
def test_what_the_compiler_refuses_is_said():
  shape = kernel.Shape(1, 128, 1, 64, 'bfloat16')
  said = 'v5e:3x3: the compiler ended with: .*3x3'
  with pytest.raises(tpu.TpuError, match=said):
    tpu.count('v5e:3x3', MemoryConfig(), shape)


def test_what_no_kernel_covers_is_said_before_anything_compiles(monkeypatch):
  monkeypatch.setattr(tpu, 'available', lambda: True)
  shape = kernel.Shape(1, 128, 1, 64, 'bfloat16')
  with pytest.raises(tpu.TpuError, match='no such kernel.*: a chunk of 12'):
    tpu.count('v5e:2x2', MemoryConfig(12, 12), shape)


@pytest.mark.parametrize('topology', ['v5e', 'v9:2x2', 'v5e:2', 'v5e:axb'])
def test_a_topology_that_is_none_is_refused(topology):
  with pytest.raises(tpu.TpuError, match=f'topology {topology}: one of'):
    tpu.environment(topology, '/tmp')


def test_the_process_is_told_what_it_compiles_for(monkeypatch):
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--given=1')
  told = tpu.environment('v5p:2x2x1', '/dump')
  assert told['TPU_ACCELERATOR_TYPE'] == 'v5p-8'
  assert told['LIBTPU_INIT_ARGS'].startswith('--given=1 --xla_jf_dump_to=/dump')
  assert tpu.environment('v5e:4x4', '')['TPU_ACCELERATOR_TYPE'] == (
    'v5litepod-16'
  )


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(tpu, 'available', lambda: False)
  with pytest.raises(tpu.TpuError, match="pip install '.\\[tpu\\]'"):
    tpu.count('v5e:2x2', MemoryConfig(), kernel.Shape(1, 64, 1, 64, 'bfloat16'))


def write_dump(folder, name='memory_forward.1'):
  """Two files as the compiler writes them, cut to what is read."""
  (folder / f'17-{name}-71-{tpu.SUMMARY}').write_text(
    'Schedule analysis:\n\ttotal scheduled bundles:    2207\n\tempty: 20\n'
  )
  (folder / f'17-{name}-64-{tpu.WITH_WAITS}').write_text(
    'Schedule analysis:\n\ttotal scheduled bundles:    3100\n\tempty: 913\n'
  )
  (folder / f'17-{name}-70-{tpu.UNITS}').write_text(
    '== CAPACTIY:\nMATMUL, MATPUSH, VSTORE, VSTORE:SPILL\n'
    '    4     4     1      1\n== UTILIZATION:\n4 0 1 1\n2 1 1 0\n0 0 1 1\n'
  )


def test_a_dump_is_read(tmp_path):
  write_dump(tmp_path)
  assert tpu.read(tmp_path, 'memory_forward') == tpu.Count(2207, 3100, 1.5, 2)
  # the name of one kernel begins that of another
  write_dump(tmp_path, 'memory_forward_saving.1')
  assert tpu.read(tmp_path, 'memory_forward').bundles == 2207
  with pytest.raises(tpu.TpuError, match='no memory_backward'):
    tpu.read(tmp_path, 'memory_backward')


def test_rows_are_for_one_head(monkeypatch):
  found = tpu.Count(2000, 3000, 500.0, 40)
  counts = {'memory_forward': found, 'memory_backward': found}
  monkeypatch.setattr(tpu, 'count', lambda *_: counts)
  shape = kernel.Shape(1, 256, 4, 64, 'bfloat16')
  ahead, back = tpu.measure('v5e:2x2', MemoryConfig(), shape)
  # four heads a step ahead, two back
  assert ahead['bundles'] == 500 and back['bundles'] == 1000
  assert back['cycles'] == 1500 and back['spills'] == 20
  assert back['/ matrix unit'] == 4


def record() -> None:
  found = {t: {} for t in TOPOLOGIES}
  for topology, name in CASES:
    found[topology][name] = counts(topology, name)
  lines = ['{', f'"libtpu": "{compiler()}",']
  for i, (topology, sizes) in enumerate(found.items()):
    lines.append(f'"{topology}": {{')
    rows = [f'  "{name}": {json.dumps(row)}' for name, row in sizes.items()]
    lines += [',\n'.join(rows), '},' if i + 1 < len(found) else '}']
  GOLDEN.write_text('\n'.join([*lines, '}']) + '\n')


if __name__ == '__main__':
  record()
