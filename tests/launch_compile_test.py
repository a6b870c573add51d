"""The command, as a process, and TPUs' own compiler.

Needs libtpu for the latter (`pip install '.[tpu]'`, or
TPU_LIBRARY_PATH=.../libtpu.so); without it those are skipped.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest

from nestax.launch import command, costs, hlo
from nestax.launch import compile as compile_
from nestax.launch.benches import tpu

needs_libtpu = pytest.mark.skipif(
  not tpu.available(),
  reason="no libtpu to compile with: pip install '.[tpu]' or TPU_LIBRARY_PATH",
)
TINY = ['--config=tiny', '--config.model.family=transformer',
        '--config.optimizer=adamw', '--config.model.D=128',
        '--config.data.length=128', '--config.train.batch=16',
        '--config.mesh.data=4', '--config.mesh.fsdp=4']  # fmt: skip


def python(*words):
  # one device, whatever the tests have: the command sees to its own
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return subprocess.run(
    [sys.executable, *words], capture_output=True, text=True, env=env
  )


def run(*words):
  return python('-m', 'nestax.launch.compile', *words)


def test_help_explains_the_figures_that_do_not_explain_themselves(capsys):
  parse = command.parser(
    'nestax-compile', compile_.__doc__, compile_.FLAGS, 'quickstart'
  )
  with pytest.raises(SystemExit):
    parse(['nestax-compile', '--help'])
  said = capsys.readouterr().out
  for name in ('useful', 'usual TFLOP', 'loops not read'):
    assert said.count(f"'{name}'") == 1, name


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@needs_libtpu
def test_a_step_compiles_for_sixteen_chips(tmp_path):
  path, text = tmp_path / 'rows.jsonl', tmp_path / 'step.hlo'
  done = run(
    *TINY,
    '--topology=v5e:4x4',
    '--effort=O1',
    f'--json={path}',
    f'--hlo={text}',
  )
  assert done.returncode == 0, done.stderr
  (row,) = rows_of(path)
  assert row['fits'] and (row['devices'], row['HBM GiB']) == (16, 16)
  assert row['mesh'] == 'data=4 fsdp=4'
  assert row['tokens'] == 16 * 128 and row['loops not read'] == 0
  # weights are gathered, whole or by a ring, and nothing is counted twice
  assert row['all-gather GB'] + row['collective-permute GB'] > 0
  assert 0.5 < row['useful'] < 1.1
  # gradients are scattered along fsdp; a fourth of them is summed along data
  sent = costs.costs(hlo.parse(text.read_text())).sent
  assert row['reduce-scatter GB'] == sent['reduce-scatter'] / 1e9
  assert row['reduce-scatter GB'] > row['all-reduce GB'] > 0
  assert row['bound'] in ('compute', 'HBM', 'ICI')
  assert '| total GiB |' in done.stdout and 'It fits' in done.stdout


@needs_libtpu
@pytest.mark.parametrize('topology', ['v5p:8x8x4', 'v6e:16x16'])
def test_any_mesh_of_as_many_chips_can_be_laid(topology):
  """16 by 16 on 8 x 8 x 4, where an axis of wires serves two of the mesh."""
  words = (
    'from nestax.launch import ahead, mesh\n'
    f'ahead.settle({topology!r})\n'
    f'there = ahead.devices({topology!r})\n'
    "sizes = {'data': -1, 'fsdp': 16, 'tensor': 1, 'sequence': 1}\n"
    'made = mesh.make(sizes, 256, 8, there)\n'
    'assert sorted(made.device_ids.flat) == list(range(256))\n'
    'print(*made.shape.values())\n'
  )
  done = python('-c', words)
  assert done.stdout.split() == ['16', '16', '1', '1'], done.stderr


@needs_libtpu
@pytest.mark.slow
def test_hope_30m_compiles_for_sixteen_chips(tmp_path):
  path = tmp_path / 'rows.jsonl'
  mesh = ['--config.mesh.data=1', '--config.mesh.fsdp=16']
  done = run(
    '--config=hope_30m', *mesh, '--topology=v5e:4x4', '--effort=O1',
    f'--json={path}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  (row,) = rows_of(path)
  assert row['fits'] and row['loops not read'] == 0


@needs_libtpu
@pytest.mark.slow
def test_flops_of_a_chip_scale_weakly(tmp_path):
  """The same rows a chip on 256 and on 1,024 chips: FLOPs within 3%."""
  path = tmp_path / 'rows.jsonl'
  for chips, topology in ((256, 'v5p:8x8x4'), (1024, 'v5p:8x8x16')):
    done = run(
      '--config=hope_30m', f'--config.train.batch={chips}',
      '--config.mesh.fsdp=16', f'--topology={topology}', '--effort=O1',
      f'--json={path}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
  small, large = rows_of(path)
  assert abs(large['usual TFLOP'] / small['usual TFLOP'] - 1) < 0.03


def main(monkeypatch, *words):
  importlib.reload(compile_)  # a config's flags are defined when first read
  argv = ['nestax-compile', '--config=tiny', *words]
  monkeypatch.setattr(sys, 'argv', argv)  # where they are looked for
  parse = command.parser('nestax-compile', '', compile_.FLAGS, 'quickstart')
  try:
    return compile_.main(parse(argv))
  except SystemExit as stop:
    return stop.code


@pytest.mark.parametrize(
  'words, said',
  [
    (['--topology=v5e'], 'topology v5e: one of v5e, v5p, v6e'),
    (['--topology=cpu:4', '--config.train.batch=6'], '6 rows'),
    (['--topology=cpu:4', '--peaks=1,2'], '--peaks=1,2: four numbers'),
    (['--topology=cpu:4', '--config.model.D=16x'], 'model.D=16x'),
    (['--topology=cpu:4', '--effort=O4'], 'one of'),
    (['--topology=cpu:4', 'word'], "unexpected argument 'word'"),
  ],
  ids=lambda x: x[-1] if isinstance(x, list) else '',
)
def test_what_cannot_be_is_refused_in_words(words, said, capsys, monkeypatch):
  assert main(monkeypatch, *words) == 2
  stderr = capsys.readouterr().err
  assert stderr.startswith('nestax-compile: ') and said in stderr


@needs_libtpu
def test_what_the_compiler_does_not_know_is_refused_in_words():
  done = run('--config=tiny', '--topology=v5e:3x3')
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert 'nestax-compile: topology v5e:3x3: ' in done.stderr
