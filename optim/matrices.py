"""Which axes of a parameter are a matrix, and stacks of such matrices.

An array becomes `[batch, in, out]`: `reduction_axis` of optax's
`MuonDimensionNumbers` are the axes that a layer sums over (in), `output_axis`
those that it makes (out), all others are a batch of independent matrices. So
layers stacked by a scan and heads kept apart need nothing but numbers:
`query/kernel [N, D, H, K]` is `(1, (2, 3))`, `out/kernel [N, H, K, D]` is
`((1, 2), 3)`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nestax.optim import labels

MuonDimensionNumbers = optax.contrib.MuonDimensionNumbers
# A tree like the parameters, a function that makes one, or None: the last two
# axes are (in, out).
DimensionNumbers = Any | Callable[[Any], Any] | None
LAST_TWO = MuonDimensionNumbers(-2, -1)


class MatrixError(ValueError):
  """A parameter cannot be read as a stack of matrices."""


def resolve(tree: Any, dimension_numbers: DimensionNumbers) -> Any:
  """Gives every leaf of `tree` its dimension numbers, found by its path.

  `tree` may have masked leaves (`optax.MaskedNode`) where the dimension
  numbers do not.

  Raises:
    MatrixError: for a leaf without numbers, or of a rank below 2, or not of
      real floats, or whose axes are out of range or named twice.
  """
  if callable(dimension_numbers):
    dimension_numbers = dimension_numbers(tree)
  table = None
  if dimension_numbers is not None:
    leaves, _ = jax.tree_util.tree_flatten_with_path(
      dimension_numbers, is_leaf=_is_numbers
    )
    table = {labels.path_of(keys): numbers for keys, numbers in leaves}

  def find(keys, leaf):
    path = labels.path_of(keys)
    numbers = LAST_TWO if table is None else table.get(path)
    if not _is_numbers(numbers):
      known = ', '.join(table) or 'none'
      raise MatrixError(
        f'{path} has no dimension numbers: it needs MuonDimensionNumbers at '
        f'its own path; paths of those given: {known}'
      )
    _check_dtype(path, leaf.dtype)
    _check(path, leaf.shape, numbers)
    return numbers

  return jax.tree_util.tree_map_with_path(find, tree)


def to_stack(x: jax.Array, numbers: MuonDimensionNumbers) -> jax.Array:
  """Reads an array as `[batch, in, out]`."""
  parts = _axes(x.ndim, numbers)
  # All three, since no size can be told from an array of no elements.
  sizes = [math.prod(x.shape[i] for i in axes) for axes in parts]
  return x.transpose(sum(parts, ())).reshape(sizes)


def from_stack(
  x_BxIxO: jax.Array, shape: tuple[int, ...], numbers: MuonDimensionNumbers
) -> jax.Array:
  """Undoes `to_stack` for an array of this shape."""
  batch, reduction, output = _axes(len(shape), numbers)
  order = batch + reduction + output
  back = sorted(range(len(shape)), key=lambda i: order[i])
  return x_BxIxO.reshape([shape[i] for i in order]).transpose(back)


def sizes(
  shape: tuple[int, ...], numbers: MuonDimensionNumbers
) -> tuple[int, int]:
  """Gives the matrix sizes (in, out) of an array of this shape."""
  _, reduction, output = _axes(len(shape), numbers)
  rows = math.prod(shape[i] for i in reduction)
  return rows, math.prod(shape[i] for i in output)


def matrix_axes(ndim: int, numbers: MuonDimensionNumbers) -> tuple[int, ...]:
  """Lists the axes that one matrix covers, in and out together."""
  _, reduction, output = _axes(ndim, numbers)
  return reduction + output


def _axes(ndim, numbers):
  def normal(axes):
    axes = (axes,) if isinstance(axes, int) else axes
    return tuple(axis % ndim for axis in axes)

  reduction = normal(numbers.reduction_axis)
  output = normal(numbers.output_axis)
  batch = tuple(i for i in range(ndim) if i not in reduction + output)
  return batch, reduction, output


def _check_dtype(path, dtype):
  if not jnp.issubdtype(dtype, jnp.floating):
    raise MatrixError(
      f'{path} has the dtype {dtype}: a matrix has to be of real floats; label '
      'it for another optimiser'
    )


def _check(path, shape, numbers):
  if len(shape) < 2:
    raise MatrixError(
      f'{path} has the shape {shape}: a matrix needs 2 axes or more; label '
      'it for another optimiser'
    )
  named = []
  for axes in numbers:
    named += [axes] if isinstance(axes, int) else list(axes)
  if any(not -len(shape) <= axis < len(shape) for axis in named):
    raise MatrixError(
      f'{path} has the shape {shape}: {numbers} names an axis out of range'
    )
  if len({axis % len(shape) for axis in named}) < len(named):
    raise MatrixError(f'{path}: {numbers} names an axis twice')


def _is_numbers(x):
  return isinstance(x, MuonDimensionNumbers)
