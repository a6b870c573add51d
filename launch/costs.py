"""What a compiled program computes, moves and sends, on one device.

XLA's own cost analysis counts the body of a loop once, and layers, chunks and
microbatches are loops. Here a body counts as often as its loop turns (see
`hlo.trips`); a loop whose turns cannot be read counts once, and is listed.

FLOPs are those of matrix products (`dot`, `convolution`, and of kernels, see
`kernel_costs`), two a multiply-add; of a convolution
only pairs that are not padding. Traffic is what a fusion reads and writes,
intermediate values inside it left out; of an operand that is only sliced, or
updated in place, just the slice; buffers that the compiler placed on the chip
(a memory space other than 0) count nothing. Collectives count what a device
sends if all go round in rings. Of branches the dearest counts, or on request
the cheapest.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from nestax.launch import kernel_costs
from nestax.launch.hlo import Computation, Instruction, Module, trips

KINDS = (
  'all-gather',
  'reduce-scatter',
  'all-reduce',
  'collective-permute',
  'all-to-all',
)
NO_TRAFFIC = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
  'conditional', 'call', 'after-all', 'partition-id', 'replica-id', 'iota',
  'opt-barrier', 'add-dependency', 'broadcast',
}  # fmt: skip
_FURTHER = r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"'
SLICES = ('dynamic-slice', 'slice', 'gather')


class Costs(NamedTuple):
  """What one device does.

  Attributes:
    flops: of matrix products.
    traffic: bytes from and to main memory.
    sent: bytes to other devices, by kind of collective.
    unknown: loops whose turns could not be read.
  """

  flops: float = 0.0
  traffic: float = 0.0
  sent: Mapping[str, float] = dict.fromkeys(KINDS, 0.0)
  unknown: tuple[str, ...] = ()

  def plus(self, other: 'Costs', times: int = 1) -> 'Costs':
    return Costs(
      self.flops + times * other.flops,
      self.traffic + times * other.traffic,
      {kind: self.sent[kind] + times * other.sent[kind] for kind in KINDS},
      tuple(dict.fromkeys(self.unknown + other.unknown)),
    )


def costs(module: Module, cheapest: bool = False) -> Costs:
  """Adds up the program, loops as often as they turn.

  Args:
    module: the program.
    cheapest: of branches, take the one of fewest FLOPs, not of most.
  """
  done = {}

  def of(name: str) -> Costs:
    if name not in done:
      done[name] = _sum(module, module.computations[name], of, cheapest)
    return done[name]

  return of(module.entry)


def _sum(module, body: Computation, of, cheapest: bool) -> Costs:
  total = Costs()
  for one in body.instructions.values():
    if one.opcode == 'while':
      turns = trips(module, body, one)
      inner = of(one.called('body'))
      if turns is None:
        inner = inner._replace(unknown=(*inner.unknown, one.name))
      total = total.plus(inner, turns or 1)
    elif one.opcode == 'conditional':
      branches = [of(name) for name in _branches(one)]
      pick = min if cheapest else max
      total = total.plus(pick(branches, key=lambda c: c.flops))
    else:
      total = total.plus(_one(module, body, one, of))
  return total


def _branches(one: Instruction) -> list[str]:
  listed = re.search(r'branch_computations=\{([^}]*)\}', one.attributes)
  if listed:
    return re.findall(r'%[^\s,]+', listed[1])
  return [one.called('true_computation'), one.called('false_computation')]


def _one(module, body, one: Instruction, of) -> Costs:
  traffic = _traffic(module, body, one)
  flops, sent, unknown = 0.0, dict.fromkeys(KINDS, 0.0), ()
  called = one.called('calls') or (
    one.called('to_apply') if one.opcode == 'call' else None
  )
  if called and called in module.computations:
    inner = of(called)
    flops, sent, unknown = inner.flops, dict(inner.sent), inner.unknown
    # a fusion moves what goes in and out; a call moves what its body moves
    if one.opcode != 'fusion':
      traffic = inner.traffic
    elif _scatters(module.computations[called]):
      sent['reduce-scatter'] += sent['all-reduce'] / 2
      sent['all-reduce'] = 0.0
  elif one.opcode in ('dot', 'convolution'):
    flops = _product(body, one)
  elif one.opcode == 'custom-call':
    flops = kernel_costs.flops(one)
  kind = one.opcode.removesuffix('-start')
  if kind in KINDS and not _goes_on(one):
    sent[kind] += _sent(module, body, one, kind)
  return Costs(flops, traffic, sent, unknown)


def _scatters(body: Computation) -> bool:
  """Whether a fusion keeps a slice of its all-reduce: a reduce-scatter."""
  opcodes = {one.opcode for one in body.instructions.values()}
  return 'all-reduce' in opcodes and 'dynamic-slice' in opcodes


def _goes_on(one: Instruction) -> bool:
  """Whether this is a further step of a collective that began elsewhere.

  TPUs spread one over several fusions, each of which names it whole.
  """
  begun = re.search(_FURTHER, one.attributes)
  return bool(begun) and int(begun[1]) >= 0


def group_size(module: Module, one: Instruction) -> int:
  """Devices that a collective is among."""
  listed = re.search(r'replica_groups=\{\{([^}]*)\}', one.attributes)
  if listed:
    return len(listed[1].split(','))
  # by name: mesh['a'=16,'b'=16], device_ids=(...) {'a'}; of an axis that is
  # parted {'a':(2)4}, 4 after the first 2
  named = re.search(
    r'replica_groups=mesh\[([^\]]*)\][^{}]*\{([^}]*)\}', one.attributes
  )
  if named:
    sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
    among = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in among)
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]', one.attributes)
  return int(iota[2]) if iota else module.devices


def _sent(module, body, one: Instruction, kind: str) -> float:
  given = sum(
    array.bytes
    for name in one.operands
    for array in body.instructions[name].arrays
  )
  n = group_size(module, one)
  return (
    given
    * {
      'all-gather': n - 1,
      'reduce-scatter': (n - 1) / n,
      'all-reduce': 2 * (n - 1) / n,
      'collective-permute': 1,
      'all-to-all': (n - 1) / n,
    }[kind]
  )


# ---- matrix products


def _product(body: Computation, one: Instruction) -> float:
  left, right = (
    body.instructions[name].arrays[0].shape for name in one.operands
  )
  out = one.arrays[0].shape
  if one.opcode == 'dot':
    summed = re.search(r'lhs_contracting_dims=\{([^}]*)\}', one.attributes)
    axes = [int(i) for i in summed[1].split(',') if i] if summed else []
    return 2.0 * math.prod(out) * math.prod(left[i] for i in axes)
  return _convolution(one.attributes, left, right, out)


def _convolution(attributes: str, left, right, out) -> float:
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes)
  on_left, on_right, on_out = labels[1], labels[2], labels[3]
  window = re.search(r'window=\{([^}]*)\}', attributes)
  window = dict(
    part.split('=') for part in (window[1].split() if window else ())
  )
  pairs = 1
  for i, digit in enumerate(c for c in sorted(on_out) if c.isdigit()):

    def given(name, default, i=i):
      return window[name].split('x')[i] if name in window else default

    pairs *= _pairs(
      left[on_left.index(digit)],
      out[on_out.index(digit)],
      int(given('size', 1)),
      int(given('stride', 1)),
      int(given('pad', '0_0').split('_')[0]),
      int(given('lhs_dilate', 1)),
      int(given('rhs_dilate', 1)),
    )
  rows = re.search(r'batch_group_count=(\d+)', attributes)
  batch = out[on_out.index('b')] // (int(rows[1]) if rows else 1)
  # the kernel's input features are already those of one group
  features = right[on_right.index('i')] * out[on_out.index('f')]
  return 2.0 * batch * features * pairs


@functools.cache
def _pairs(size, out, window, stride, low, left_dilate, right_dilate) -> int:
  """Pairs of an output and a window's element that meet an input."""
  at = np.arange(out) * stride - low
  total = 0
  for k in range(window):
    place = at + k * right_dilate
    here = (place >= 0) & (place % left_dilate == 0)
    total += int((here & (place // left_dilate < size)).sum())
  return total


# ---- traffic


def _in_memory(arrays) -> float:
  return sum(array.bytes for array in arrays if not array.space)


def _traffic(module: Module, body: Computation, one: Instruction) -> float:
  if one.opcode in NO_TRAFFIC or one.opcode.endswith('-done'):
    return 0.0
  if one.opcode in ('copy-start', 'slice-start'):
    # results: what is made, where it comes from, a mark
    made = one.arrays[0] if one.opcode == 'copy-start' else one.arrays[-2]
    source = body.instructions[one.operands[0]].arrays[0]
    return sum(made.bytes for a in (made, source) if not a.space)
  if one.opcode in SLICES:
    source = body.instructions[one.operands[0]].arrays[0]
    return one.arrays[0].bytes * (not source.space) + _in_memory(one.arrays)
  if one.opcode in ('dynamic-update-slice', 'scatter'):
    update = body.instructions[one.operands[1]].arrays[0]
    return 2 * update.bytes * (not one.arrays[0].space)
  operands = [body.instructions[name].arrays for name in one.operands]
  if one.opcode == 'fusion':
    inner = module.computations[one.called('calls')]
    return _fused(module, inner, operands, one.arrays)
  if one.opcode.endswith('-start'):
    return sum(map(_in_memory, operands))
  return sum(map(_in_memory, operands)) + _in_memory(one.arrays)


def _fused(module: Module, inner: Computation, operands, results) -> float:
  """Reads and writes of a fusion: of what is only sliced, the slices."""
  total = 0.0
  for one in inner.instructions.values():
    if one.opcode == 'parameter':
      given = operands[int(one.inside)]
      part = _read(module, inner, one.name)
      whole = _in_memory(given)
      total += whole if part is None else min(whole, part)
  roots = [inner.instructions[inner.root]]
  if roots[0].opcode == 'tuple':
    roots = [inner.instructions[name] for name in roots[0].operands]
  for root, array in zip(roots, results):
    if not array.space:
      total += min(array.bytes, _written(module, inner, root))
  return total


def _written(module: Module, body: Computation, root: Instruction) -> float:
  """Bytes that a fusion writes of a result: of an update, what is updated."""
  while root.opcode in ('bitcast', 'fusion'):
    if root.opcode == 'bitcast':
      root = body.instructions[root.operands[0]]
      continue
    body = module.computations[root.called('calls')]
    root = body.instructions[body.root]
  if root.opcode in ('dynamic-update-slice', 'scatter'):
    place = 1 if root.opcode == 'dynamic-update-slice' else -1
    return body.instructions[root.operands[place]].arrays[0].bytes
  return math.inf


def _read(module: Module, body: Computation, name: str) -> float | None:
  """Bytes read of a value that is only sliced or updated; None if all."""
  total = 0.0
  for one in body.instructions.values():
    for place in (i for i, given in enumerate(one.operands) if given == name):
      part = _part(module, body, one, place)
      if part is None:
        return None
      total += part
  return total


def _part(module, body: Computation, one: Instruction, place: int):
  """What an instruction reads of an operand; None if all of it."""
  if one.opcode == 'bitcast':
    return _read(module, body, one.name)
  if one.opcode == 'fusion':  # one inside another
    inner = module.computations[one.called('calls')]
    for given in inner.instructions.values():
      if given.opcode == 'parameter' and int(given.inside) == place:
        return _read(module, inner, given.name)
  if one.opcode in SLICES and place == 0:
    return one.arrays[0].bytes
  if one.opcode == 'dynamic-update-slice' and not place:
    return 0.0
  return None
