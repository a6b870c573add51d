"""Reads a compiled program's text: computations, instructions, loops.

How often a loop turns is the compiler's note (`known_trip_count`), or else
read off the loop itself: a counter that starts at a constant, goes up by a
constant and is held against one.
"""

import math
import re
from typing import NamedTuple

BITS = {'pred': 8, 'token': 0, 'opaque': 0}  # the others carry theirs in names


class HloError(ValueError):
  """The text is not what a compiled program looks like."""


class Array(NamedTuple):
  """Of a type: `space` 0 is the device's main memory."""

  dtype: str
  shape: tuple[int, ...]
  space: int

  @property
  def bytes(self) -> float:
    bits = BITS.get(self.dtype)
    if bits is None:
      bits = int(re.search(r'\d+', self.dtype)[0])
    return bits / 8 * math.prod(self.shape)


class Instruction(NamedTuple):
  """One line; `arrays` are its results, tuples laid flat."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  inside: str  # what stands between the parentheses
  attributes: str

  def called(self, attribute: str) -> str | None:
    """Name of the computation that an attribute names."""
    found = re.search(rf'\b{attribute}=(%[^\s,)}}]+)', self.attributes)
    return found and found[1]


class Computation(NamedTuple):
  """Instructions by name, in the order of the text."""

  instructions: dict[str, Instruction]
  root: str


class Module(NamedTuple):
  """A compiled program."""

  computations: dict[str, Computation]
  entry: str
  devices: int


_ARRAY = re.compile(r'\b([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?')
_LINE = re.compile(r'^\s*(ROOT )?(%\S+) = ')
_HEAD = re.compile(r'^(ENTRY )?(%\S+) .*\{\s*$')


def parse(text: str) -> Module:
  """Reads the text of `compiled.as_text()`.

  Raises:
    HloError: if it holds no program.
  """
  computations, entry, name = {}, None, None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head and ' = ' not in line.split('(')[0]:
      name = head[2]
      computations[name] = Computation({}, '')
      entry = name if head[1] else entry
      continue
    start = _LINE.match(line)
    if name is None:
      continue
    body = computations[name]
    if start is None:
      if body.instructions:  # a kernel's JSON goes over several lines
        last, one = body.instructions.popitem()
        attributes = f'{one.attributes}\n{line}'
        body.instructions[last] = one._replace(attributes=attributes)
      continue
    one = _instruction(start[2], line[start.end() :])
    body.instructions[one.name] = one
    if start[1]:
      computations[name] = body._replace(root=one.name)
  if entry is None:
    raise HloError('the text has no ENTRY: not a compiled program')
  devices = re.search(r'\bnum_partitions=(\d+)', text)
  return Module(computations, entry, int(devices[1]) if devices else 1)


def _instruction(name: str, rest: str) -> Instruction:
  stop = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
  kind, rest = rest[:stop], rest[stop:].lstrip()
  start = rest.index('(')
  stop = _closing(rest, start)
  inside = rest[start + 1 : stop - 1]
  return Instruction(
    name,
    rest[:start],
    _arrays(kind),
    tuple(re.findall(r'%[^\s,()]+', inside)),
    inside,
    rest[stop:],
  )


def _closing(text: str, start: int) -> int:
  """Index after the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.finditer(r'[()]', text[start:]):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return start + found.end()
  raise HloError(f'unbalanced parentheses: {text[:80]!r}')


def _arrays(kind: str) -> tuple[Array, ...]:
  made = []
  for dtype, sizes, layout in _ARRAY.findall(kind):
    space = re.search(r'S\((\d+)\)', layout)
    shape = tuple(int(n.lstrip('<=')) for n in sizes.split(',') if n)
    made.append(Array(dtype, shape, int(space[1]) if space else 0))
  return tuple(made)


def trips(module: Module, body: Computation, loop: Instruction) -> int | None:
  """How often a loop turns; None where that cannot be read."""
  noted = re.search(r'known_trip_count[^0-9]{1,8}(\d+)', loop.attributes)
  if noted:
    return int(noted[1])
  bound = _bound(module, module.computations[loop.called('condition')])
  if bound is None:
    return None
  index, limit, inclusive = bound
  step = _step(module.computations[loop.called('body')], index)
  start = _start(body, loop, index)
  if step is None or start is None or step <= 0:
    return None
  return max(0, -(-(limit + inclusive - start) // step))


def _constant(body: Computation, name: str) -> int | None:
  one = body.instructions.get(name)
  while one is not None and one.opcode in ('copy', 'bitcast', 'convert'):
    one = body.instructions.get(one.operands[0])
  if one is None or one.opcode != 'constant':
    return None
  return int(one.inside) if re.fullmatch(r'-?\d+', one.inside) else None


def _element(body: Computation, name: str) -> int | None:
  """Which element of the computation's parameter a value is."""
  one = body.instructions.get(name)
  while one is not None and one.opcode in ('copy', 'bitcast'):
    one = body.instructions.get(one.operands[0])
  if one is None or one.opcode != 'get-tuple-element':
    return None
  found = re.search(r'index=(\d+)', one.attributes)
  return int(found[1])


def _bound(module, condition: Computation):
  """(element, limit, whether the limit itself counts) of `element < limit`."""
  one, outside = condition.instructions[condition.root], None
  if one.opcode == 'fusion':
    outside = one.operands
    inner = module.computations[one.called('calls')]
    one = inner.instructions[inner.root]
  way = re.search(r'direction=(LT|LE)', one.attributes)
  if one.opcode != 'compare' or not way:
    return None
  names = one.operands
  if outside:
    names = [_outside(inner, outside, name) for name in names]
  index, limit = _element(condition, names[0]), _constant(condition, names[1])
  if outside and limit is None:
    limit = _constant(inner, one.operands[1])
  if index is None or limit is None:
    return None
  return index, limit, way[1] == 'LE'


def _outside(inner: Computation, operands, name: str) -> str:
  one = inner.instructions[name]
  return operands[int(one.inside)] if one.opcode == 'parameter' else name


def _step(body: Computation, index: int) -> int | None:
  root = body.instructions[body.root]
  if root.opcode != 'tuple':
    return None
  one = body.instructions[root.operands[index]]
  while one.opcode in ('copy', 'bitcast'):
    one = body.instructions[one.operands[0]]
  if one.opcode != 'add':
    return None
  for a, b in (one.operands, one.operands[::-1]):
    if _element(body, a) == index and _constant(body, b) is not None:
      return _constant(body, b)
  return None


def _start(body: Computation, loop: Instruction, index: int) -> int | None:
  given = body.instructions[loop.operands[0]]
  if given.opcode != 'tuple':
    return None
  return _constant(body, given.operands[index])
