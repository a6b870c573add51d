"""Logical axes to mesh axes: the one file of models/ that knows mesh names.

Modules name the axes of what they own in words (`embed`, `heads`, ...); the
table below says on which mesh axes each of them may be laid. An axis that the
mesh lacks, or that does not divide a dimension, leaves it whole.
"""

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ('data', 'fsdp', 'tensor', 'sequence')

RULES = {
  'batch': ('data', 'fsdp'),
  'length': ('sequence',),
  'vocab': ('tensor',),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'mlp': ('tensor',),
  'activation': (),
  'head_dim': (),
  'memory': (),
  'taps': (),
  'layers': (),
  'levels': (),
}


def partition_spec(names, shape, sizes) -> PartitionSpec:
  """Returns the mesh axes of one array.

  Args:
    names: one logical axis, or None, per dimension.
    shape: the array's shape; a dimension that its mesh axes do not divide
      stays whole.
    sizes: mesh axis -> number of devices along it.

  Raises:
    ValueError: for a logical axis that has no rule.
  """
  taken = set()
  spec = []
  for name, dim in zip(names, shape, strict=True):
    if name is not None and name not in RULES:
      raise ValueError(f'logical axis {name!r} has no rule in models/axes.py')
    chosen, total = [], 1
    for axis in RULES.get(name, ()):
      size = sizes.get(axis, 1)
      if size > 1 and axis not in taken and dim % (total * size) == 0:
        chosen.append(axis)
        total *= size
    taken.update(chosen)
    spec.append(tuple(chosen) or None)
  return PartitionSpec(*spec)


def _is_boxed(leaf) -> bool:
  return isinstance(leaf, nn.Partitioned)


def shardings(mesh: Mesh, boxed):
  """Shardings of parameters as `init` (or its eval_shape) returns them, boxed.

  The result has the structure of `nn.unbox(boxed)`.
  """

  def one(leaf):
    if not _is_boxed(leaf):
      return NamedSharding(mesh, PartitionSpec())
    spec = partition_spec(leaf.names, leaf.value.shape, mesh.shape)
    return NamedSharding(mesh, spec)

  return jax.tree.map(one, boxed, is_leaf=_is_boxed)


def logical_axes(boxed):
  """The names of the axes of every parameter, as a tree of tuples."""
  return jax.tree.map(
    lambda leaf: leaf.names if _is_boxed(leaf) else (),
    boxed,
    is_leaf=_is_boxed,
  )


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
  """Rows of a batch over the data axes; a row's length over `sequence`."""
  names = ('batch', 'length')[:ndim] + (None,) * (ndim - 2)
  rows = tuple(a for a in RULES['batch'] if mesh.shape.get(a, 1) > 1) or None
  cols = tuple(a for a in RULES['length'] if mesh.shape.get(a, 1) > 1) or None
  return NamedSharding(mesh, PartitionSpec(*(rows, cols)[: len(names)]))


def state_shardings(mesh: Mesh, state, leading=('layers', 'batch')):
  """Shardings of per-sequence state.

  Args:
    mesh: the devices.
    state: a tree of arrays.
    leading: names of the first axes of every leaf. A third axis of heads goes
      where the heads' parameters go (rank five: fast parts and KV caches
      carry their heads there by construction).
  """

  def one(leaf):
    names = [*leading, *[None] * (leaf.ndim - len(leading))]
    if leaf.ndim == 5:
      names[2] = 'heads'
    spec = partition_spec(names, leaf.shape, mesh.shape)
    return NamedSharding(mesh, spec)

  return jax.tree.map(one, state)


def constrain(x, *names):
  """Lays an activation on the mesh in force; without one it is left alone."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or all(size == 1 for size in mesh.axis_sizes):
    return x
  spec = partition_spec(names, x.shape, dict(mesh.shape))
  return jax.lax.with_sharding_constraint(x, spec)
