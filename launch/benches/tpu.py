"""Counts what the memory's kernels cost on a TPU, without a TPU.

`libtpu` compiles ahead of time on any machine (`pip install '.[tpu]'`, or
TPU_LIBRARY_PATH=.../libtpu.so). Its dump holds a kernel's scheduled bundles:
the kernel's body is a grid step, one chunk of a few heads. One is about a cycle
of a core, but where nothing is issued, while a product or a move over lanes is
waited for, there is none: cycles are the bundles before those that are empty
are taken out. The floor is what its matrix products keep the matrix units
busy for, by the compiler's own table. A process of its own compiles, so that
libtpu and its settings stay out of this one.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

from nestax.models.memory import pallas_tpu, tpu_vmem
from nestax.models.memory.types import MemoryConfig

# Generation -> its name in TPU_ACCELERATOR_TYPE, cores of a chip.
GENERATIONS = {'v5e': ('v5litepod', 1), 'v5p': ('v5p', 2), 'v6e': ('v6e', 1)}
KERNELS = ('memory_forward', 'memory_forward_saving', 'memory_backward')
MISSING = "there is no libtpu to compile with: pip install '.[tpu]'"
SUMMARY = 'schedule-analysis_final_bundles.txt'
WITH_WAITS = 'schedule-analysis_packed-bundles-post-ra.txt'
UNITS = 'final_hlo-static-per-bundle-utilization.txt'


class TpuError(ValueError):
  """The kernels cannot be compiled for what is asked for."""


class Count(NamedTuple):
  """Of a kernel's body."""

  bundles: int
  cycles: int  # bundles and those in which nothing is issued
  matrix: float  # bundles that its products alone would take
  spills: int  # vector registers stored for want of room


def available() -> bool:
  """Whether there is a libtpu to compile with."""
  if os.environ.get('TPU_LIBRARY_PATH'):
    return True
  return importlib.util.find_spec('libtpu') is not None


def accelerator(topology: str) -> str:
  """What libtpu calls a machine of that topology.

  Raises:
    TpuError: for a topology that is not `GENERATION:AxB` or `AxBxC`.
  """
  generation, _, sizes = topology.partition(':')
  if generation not in GENERATIONS or not re.fullmatch(r'\d+(x\d+)+', sizes):
    raise TpuError(
      f'topology {topology}: one of {", ".join(GENERATIONS)} and its '
      'chips, such as v5e:2x2 or v5p:2x2x1'
    )
  name, cores = GENERATIONS[generation]
  return f'{name}-{math.prod(map(int, sizes.split("x"))) * cores}'


def settings(topology: str) -> dict[str, str]:
  """What libtpu needs to find in the environment before it is loaded.

  Raises:
    TpuError: as `accelerator`.
  """
  return {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': accelerator(topology),
    'TPU_WORKER_HOSTNAMES': 'localhost',
    # what an error says ends what is printed, not a word about its frames
    'JAX_TRACEBACK_FILTERING': 'off',
    # nothing runs on a device: several may compile at once
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }


def environment(topology: str, folder: str) -> dict[str, str]:
  """What the compiling process needs to be told; raises as `accelerator`."""
  dump = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
  given = os.environ.get('LIBTPU_INIT_ARGS', '')
  dumping = {'LIBTPU_INIT_ARGS': f'{given} {dump}'.strip()}
  return os.environ | settings(topology) | dumping


def count(
  topology: str, cfg: MemoryConfig, shape, documents: bool = False
) -> dict[str, Count]:
  """Compiles the kernels for a topology and reads the dump.

  Args:
    topology: such as v5e:2x2.
    cfg: the rule.
    shape: `kernel.Shape` of the inputs.
    documents: whether they may start inside rows.

  Returns:
    Kernel -> Count of one grid step, see KERNELS.

  Raises:
    TpuError: without libtpu, for an unknown topology, for a rule or shape that
      the kernels do not cover, or with the compiler's words if it refuses.
  """
  accelerator(topology)
  try:
    pallas_tpu.check_rows(cfg, shape.T, shape.K, shape.dtype)
  except pallas_tpu.DoesNotFit as reason:
    raise TpuError(f'there is no such kernel for TPUs: {reason}') from None
  if not available():
    raise TpuError(MISSING)
  with tempfile.TemporaryDirectory() as folder:
    asked = {'topology': topology, 'rule': dataclasses.asdict(cfg)}
    asked |= {'shape': list(shape), 'documents': documents}
    words = [sys.executable, '-m', 'nestax.launch.benches.tpu_compile']
    done = subprocess.run(
      [*words, json.dumps(asked)],
      env=environment(topology, folder),
      capture_output=True,
      text=True,
    )
    if done.returncode:
      lines = done.stderr.strip().splitlines() or ['no word']
      raise TpuError(f'{topology}: the compiler ended with: {lines[-1]}')
    return {name: read(pathlib.Path(folder), name) for name in KERNELS}


def read(folder: pathlib.Path, kernel: str) -> Count:
  """Reads a kernel's counts from a dump.

  Raises:
    TpuError: if the dump does not hold the kernel.
  """
  # names look like 1795533-memory_forward.1-71-schedule-analysis_...
  found = [
    sorted(folder.glob(f'*-{kernel}.*-{name}'))
    for name in (SUMMARY, WITH_WAITS, UNITS)
  ]
  if not all(found):
    raise TpuError(f'the dump in {folder} holds no {kernel}')
  *summaries, units = [paths[-1].read_text(errors='replace') for paths in found]
  bundles, cycles = [
    int(re.search(r'total scheduled bundles:\s+(\d+)', text)[1])
    for text in summaries
  ]
  head, rows = units.split('== UTILIZATION:')
  names, capacity = head.strip().splitlines()[-2:]
  names = [name.strip() for name in names.split(',')]
  sums = [0] * len(names)
  for row in rows.strip().splitlines():
    sums = [a + int(b) for a, b in zip(sums, row.split())]
  used, room = dict(zip(names, sums)), dict(zip(names, capacity.split()))
  # compilers of 2026 say MXU for what those before called MATMUL
  unit = 'MXU' if 'MXU' in used else 'MATMUL'
  matrix = used[unit] / int(room[unit])
  return Count(bundles, cycles, matrix, used['VSTORE:SPILL'])


def measure(topology: str, cfg: MemoryConfig, shape) -> list[dict]:
  """Rows of a table, per chunk of a head: see Count, and bundles by floor."""
  words = cfg, cfg.chunks[0], shape.H, shape.K, shape.dtype
  ahead, back = tpu_vmem.heads_ahead(*words), tpu_vmem.heads_a_step(*words)
  rows = []
  for name, of in count(topology, cfg, shape).items():
    heads = back if name == 'memory_backward' else ahead
    rows.append({
      'name': name,
      'T': shape.T,
      'bundles': of.bundles / heads,
      'cycles': of.cycles / heads,
      'matrix unit': of.matrix / heads,
      '/ matrix unit': of.bundles / of.matrix,
      'spills': of.spills / heads,
    })  # fmt: skip
  return rows
