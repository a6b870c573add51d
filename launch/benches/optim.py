"""Times optimisers on matrices: `nestax-bench optim --shapes=24x1536x4096`.

A step is the update and its application to float32 parameters, both donated.
'ms' is the mean of a window of steps, 'cheapest' and 'dearest' are its least
and its longest; of each the table has the median over the windows.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from nestax.launch.benches import timing
from nestax.optim import m3

PRESETS = {
  'tiny': ('2x64x64',) * 4 + ('2x64x256',) * 2 + ('2x256x64',),
  # The matrices of 24 blocks of width 1536: 679,477,248 numbers.
  '679m': ('24x1536x1536',) * 4 + ('24x1536x4096',) * 2 + ('24x4096x1536',),
}
PEER = 'optax muon, bf16'  # gradients and momentum: the faster way to run it
FLOOR = 'matmuls alone'
FLAGS = flags.FlagValues()
_PRESET = flags.DEFINE_enum(
  'preset', 'tiny', list(PRESETS),
  'Set of matrix shapes to time.',
  flag_values=FLAGS,
)  # fmt: skip
_SHAPES = flags.DEFINE_list(
  'shapes', [],
  'Shapes of stacked matrices instead, such as 24x1536x4096.',
  flag_values=FLAGS,
)  # fmt: skip
_REPEATS = flags.DEFINE_integer(
  'repeats', 5,
  'Windows of steps that are timed.',
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_EVERY = flags.DEFINE_integer(
  'every', 10,
  "Steps between updates of M3's slow momentum, and of a window.",
  lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_JSON = flags.DEFINE_string(
  'json', '',
  'File that the results are appended to, as lines of JSON.',
  flag_values=FLAGS,
)  # fmt: skip


class ShapeError(ValueError):
  """A shape is not that of a stack of matrices."""


class Entry(NamedTuple):
  """An optimiser and the dtype of the gradients it is given."""

  tx: optax.GradientTransformation
  dtype: str = 'float32'


def parse(words: Sequence[str]) -> list[tuple[int, ...]]:
  """Reads shapes such as `24x1536x4096`, matrices last.

  Raises:
    ShapeError: for a word that is not two or more whole numbers above 0.
  """
  shapes = []
  for word in words:
    sizes = word.split('x')
    if len(sizes) < 2 or not all(s.isdecimal() and int(s) for s in sizes):
      raise ShapeError(
        f'{word!r} is no shape of matrices: write it as 24x1536x4096'
      )
    shapes.append(tuple(int(size) for size in sizes))
  return shapes


def entries(every: int) -> dict[str, Entry]:
  """Names the optimisers that are timed, with nestax-train's settings."""
  slow = (m3.TimeScale(every=every),)

  def numbers(params):
    last = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda _: last, params)

  muon = functools.partial(
    optax.contrib.muon, 1e-3, muon_weight_dimension_numbers=numbers
  )
  return {
    'adamw': Entry(optax.adamw(1e-3)),
    'optax muon': Entry(muon()),
    PEER: Entry(muon(mu_dtype=jnp.bfloat16), 'bfloat16'),
    'm3': Entry(m3.m3(1e-3, slow=slow, nesterov=True)),
    'm3, bf16 slow': Entry(
      m3.m3(1e-3, slow=slow, nesterov=True, slow_dtype='bfloat16')
    ),
  }


def measure(
  shapes: Sequence[tuple[int, ...]], repeats: int, every: int
) -> list[dict]:
  """Times all optimisers in one process, in turn.

  Args:
    shapes: of the arrays, matrices on the last two axes.
    repeats: windows that are timed.
    every: steps a window of M3.

  Returns:
    Rows with milliseconds a step (the mean, the cheapest and the dearest of a
    window, of each the median over the windows, so that the mean lies between
    them), ratios to PEER and FLOOR, state in float32 copies of the matrices,
    and what the compiled step needs in GiB beside the gradients.
  """
  runs, rows = {FLOOR: _matmuls(shapes)}, {}
  # Shared, since at the size of `679m` memory would not do for one each.
  grads = {dtype: _draw(shapes, dtype) for dtype in ('float32', 'bfloat16')}
  for name, entry in entries(every).items():
    runs[name], rows[name] = _prepare(shapes, entry.tx, grads[entry.dtype])
  seconds = timing.interleaved(runs, repeats, every)
  table = []
  for name, times in seconds.items():
    row = {'name': name, 'ms': timing.median_ms(times)}
    for word, pick in (('cheapest', np.min), ('dearest', np.max)):
      row[word] = float(np.median(pick(times, axis=1)) * 1e3)
    table.append(row)
  timing.add_ratios(table, [PEER, FLOOR])
  empty = {'state copies': None, 'peak GiB': None}
  return [row | rows.get(row['name'], empty) for row in table]


def _draw(shapes, dtype):
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes)]


def _prepare(shapes, tx, grads):
  """Compiles a step that carries its own parameters and state."""

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = _draw(shapes, 'float32')
  carried = [(params, tx.init(params))]
  compiled = (
    jax.jit(step, donate_argnums=(0, 1)).lower(*carried[0], grads).compile()
  )

  def run():
    carried.append(compiled(*carried.pop(), grads))
    return carried[0]

  numbers = sum(math.prod(shape) for shape in shapes)
  size = sum(x.nbytes for x in jax.tree.leaves(carried[0][1]))
  return run, {
    'state copies': size / 4 / numbers,
    'peak GiB': timing.compiled_peak(compiled) / 2**30,
  }


def _matmuls(shapes):
  """Does what five steps of the quintic multiply, with nothing in between."""
  stacks = []
  for shape, x in zip(shapes, _draw(shapes, 'bfloat16')):
    x = x.reshape(-1, *shape[-2:]) / math.sqrt(max(shape))
    stacks.append(x if shape[-2] <= shape[-1] else x.mT)

  @jax.jit
  def run(stacks):
    def five(x):
      for _ in range(5):
        gram = x @ x.mT
        x = (gram @ gram) @ x
      return x

    groups = {}
    for x in stacks:
      groups.setdefault(x.shape[1:], []).append(x)
    return [five(jnp.concatenate(group)) for group in groups.values()]

  return lambda: run(stacks)


def main() -> None:
  """Prints the table, and adds it to a file where one is named."""
  shapes = parse(_SHAPES.value or PRESETS[_PRESET.value])
  rows = measure(shapes, _REPEATS.value, _EVERY.value)
  numbers = sum(math.prod(shape) for shape in shapes)
  title = (
    f'{numbers:,} numbers in {len(shapes)} arrays; '
    f'every={_EVERY.value}; {timing.device()}'
  )
  timing.show(rows, title)
  peak = timing.peak_bytes()
  if peak:
    print(f'\nall optimisers together held {peak / 2**30:.1f} GiB at most')
  if _JSON.value:
    timing.append(rows, _JSON.value)
