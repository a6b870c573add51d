"""Orthogonalisation by Newton-Schulz: X <- (a I + b A + c A A) X, A = X X^T.

All singular values go to 1 and the singular vectors stay (NL Eq. 42-44 and
52, Muon). One step is one polynomial on the singular values,
s <- a s + b s^3 + c s^5; coefficients are a tuple of such triples, one a
step.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nestax.optim import coefficients as coefficients_lib
from nestax.optim import matrices, norms
from nestax.optim.coefficients import MUON, Coefficients


class Layout(NamedTuple):
  """The devices that share the matrices, and how matrices lie at rest.

  A wrong guess of `rows` and `columns` costs traffic, not values.
  """

  mesh: Mesh  # with axes of the type Auto
  rows: tuple[str, ...] = ()  # mesh axes that shard the shorter side
  columns: tuple[str, ...] = ()  # mesh axes that shard the longer side


def orthogonalize(
  x: jax.Array,
  coefficients: Coefficients = MUON,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
  eps: float = 1e-8,
) -> jax.Array:
  """Brings all singular values of the matrices `[..., m, n]` close to 1.

  Args:
    x: any float dtype; scaled to Frobenius norm 1 in float32. Zeros, and
      sides of no elements, stay what they are.
    coefficients: one triple a step.
    dtype: of the matmuls' inputs; sums are float32.
    eps: added to the norm; matrices of a norm below it stay small.

  Returns:
    An array of the shape and dtype of `x`.
  """
  coefficients = coefficients_lib.read(coefficients)
  y, wide = _prepare(x, dtype, eps), x.shape[-2] <= x.shape[-1]
  y = _iterate(y, coefficients)
  return (y if wide else y.mT).astype(x.dtype)


def orthogonalize_tree(
  tree: Any,
  coefficients: Coefficients = MUON,
  dimension_numbers: matrices.DimensionNumbers = None,
  dtype: jax.typing.DTypeLike = jnp.bfloat16,
  eps: float = 1e-8,
  layout: Layout | None = None,
) -> Any:
  """Orthogonalises every leaf, equal shapes of all leaves in one batch.

  With a layout the batch of each shape is laid over all devices, so that each
  one gathers and orthogonalises its own share of whole matrices: one
  all-to-all there and one back, no matmul across devices. How the results
  lie is the partitioner's choice, unless `out_shardings` pin it.

  Args:
    tree: leaves of rank 2 or more; masked leaves are passed by.
    coefficients: one triple a step.
    dimension_numbers: see `matrices`; None for `[..., in, out]`.
    dtype: of the matmuls' inputs; sums are float32.
    eps: added to the Frobenius norm.
    layout: the devices; None to leave all layouts to the partitioner.

  Returns:
    A tree of the same structure, shapes and dtypes.
  """
  coefficients = coefficients_lib.read(coefficients)
  numbers = jax.tree.leaves(
    matrices.resolve(tree, dimension_numbers),
    is_leaf=lambda x: isinstance(x, matrices.MuonDimensionNumbers),
  )
  leaves, treedef = jax.tree.flatten(tree)
  groups = {}
  for i, (leaf, number) in enumerate(zip(leaves, numbers)):
    y = _prepare(matrices.to_stack(leaf, number), dtype, eps)
    groups.setdefault(y.shape[1:], []).append((i, y))
  results = [None] * len(leaves)
  for members in groups.values():
    stacked = jnp.concatenate([y for _, y in members])
    done = _over_mesh(stacked, coefficients, layout)
    ends = np.cumsum([len(y) for _, y in members])[:-1]
    for (i, _), part in zip(members, jnp.split(done, ends)):
      results[i] = _restore(part, leaves[i], numbers[i])
  return treedef.unflatten(results)


def _prepare(x, dtype, eps):
  """Scales to norm 1 in float32, casts, lays the longer side to the right."""
  x = norms.unit(x.astype(jnp.float32), eps).astype(dtype)
  return x if x.shape[-2] <= x.shape[-1] else x.mT


def _restore(y_BxMxN, leaf, numbers):
  rows, columns = matrices.sizes(leaf.shape, numbers)
  y = y_BxMxN if rows <= columns else y_BxMxN.mT
  return matrices.from_stack(y, leaf.shape, numbers).astype(leaf.dtype)


def _iterate(x, coefficients):
  # Matmuls sum in float32 and round once, on the way out: asking for float32
  # results doubles their traffic (59.7 against 51.1 ms a step of 679M on an
  # H100) and the next matmul would round them all the same.
  eye = jnp.eye(x.shape[-2], dtype=jnp.float32)
  eye = jnp.expand_dims(eye, range(x.ndim - 2))
  for a, b, c in coefficients:
    gram = x @ x.mT
    factor = b * gram.astype(jnp.float32)
    if c:
      factor = factor + c * (gram @ gram).astype(jnp.float32)
    # `a` joins the factor, so that x is read once, by the matmul alone.
    x = (factor + a * eye).astype(x.dtype) @ x
  return x


def _over_mesh(x_BxMxN, coefficients, layout):
  """Iterates with whole matrices on each device, then goes the way back."""
  if layout is None or layout.mesh.size == 1:
    return _iterate(x_BxMxN, coefficients)

  def lay(x, specs):
    for spec in specs:
      sharding = NamedSharding(layout.mesh, spec)
      x = jax.lax.with_sharding_constraint(x, sharding)
    return x

  batch = len(x_BxMxN)
  x = jnp.pad(x_BxMxN, ((0, -batch % layout.mesh.size), (0, 0), (0, 0)))
  specs = _way(layout, x.shape)
  x = _iterate(lay(x, specs), coefficients)
  return lay(x, specs[::-1])[:batch]


def _way(layout, shape):
  """Lists layouts from sharded matrices to a sharded batch of whole ones.

  One group of mesh axes moves at a time: the partitioner turns each move
  into an all-to-all, but a move of both into a gather of everything.
  """

  def fitting(axes, size):
    axes = tuple(a for a in axes if a in layout.mesh.axis_names)
    return () if size % math.prod(layout.mesh.shape[a] for a in axes) else axes

  rows = fitting(layout.rows, shape[1])
  columns = fitting(layout.columns, shape[2])
  names = layout.mesh.axis_names
  rest = tuple(name for name in names if name not in rows + columns)
  return [
    PartitionSpec(rest, rows, columns),
    PartitionSpec(rest + columns, rows, None),
    PartitionSpec(rest + columns + rows, None, None),
  ]
