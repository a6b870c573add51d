"""FLOPs of kernels in a compiled program: as they say, or by their shapes."""

import math
import re

from nestax.launch.hlo import Instruction

_ESTIMATE = r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)'
# JAX's attention on TPUs says nothing of itself; products of a block of each
_SPLASH = {'fwd': 2, 'dq': 3, 'dkv': 4}
_FLOATS = ('bf16', 'f32')
_LAYOUTS = r'operand_layout_constraints=\{(.*?\})\}'


def flops(one: Instruction) -> float:
  """Of matrix products, two a multiply-add; 0 for one that says nothing."""
  said = re.search(_ESTIMATE, one.attributes)
  if said:
    return float(said[1])
  kind = re.search(r'splash_m[hq]a_(fwd|dq|dkv)_', one.name)
  return _splash(one, _SPLASH[kind[1]]) if kind else 0.0


def _splash(one: Instruction, products: int) -> float:
  """Of the blocks that a causal mask, or a window, leaves."""
  layouts = re.search(_LAYOUTS, one.attributes)
  found = re.findall(r'\b(\w+)\[([\d,]+)\]', layouts[1] if layouts else '')
  arrays = [[*map(int, sizes.split(','))] for _, sizes in found]
  # tables of the mask come first, queries are the first floats
  floats = [x for (kind, _), x in zip(found, arrays) if kind in _FLOATS]
  if not floats or len(arrays[0]) != 3:
    return 0.0
  (_, rows, columns), query = arrays[0], floats[0]
  *heads, L, K = query
  blocks = rows * columns
  if rows == columns:  # no window makes the grid narrower: the lower triangle
    blocks = rows * (rows + 1) / 2
  logits = blocks * (L / max(rows, columns)) ** 2
  return 2.0 * products * K * math.prod(heads) * logits
