"""Logical axes to mesh axes: the one file of models/ that knows mesh names.

Modules name the axes of what they own in words (`embed`, `heads`, ...); the
table below says on which mesh axes each of them may be laid. An axis that the
mesh lacks, or that does not divide a dimension, leaves it whole.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
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
  # a memory's walk over the tokens: by heads where others go by length
  'walks': ('tensor', 'sequence'),
  'cache': ('sequence',),
  'memory': (),
  'memory_rows': ('fsdp',),  # of initial values
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


def _is_names(names) -> bool:
  return type(names) is tuple and all(
    name is None or isinstance(name, str) for name in names
  )


def map_names(function, names, tree):
  """`function(names, leaf)` for every leaf of a tree.

  Args:
    function: what to call.
    names: a tree of tuples of logical axes that is a prefix of `tree`: a tuple
      holds for every leaf below it.
    tree: arrays or their shapes.
  """
  below = lambda names, part: jax.tree.map(lambda x: function(names, x), part)  # noqa: E731
  return jax.tree.map(below, names, tree, is_leaf=_is_names)


def stacked(names, *leading):
  """Names of a tree whose leaves have further axes in front, such as layers."""
  return jax.tree.map(lambda n: (*leading, *n), names, is_leaf=_is_names)


def state_shardings(mesh: Mesh, state, names):
  """Shardings of per-sequence state.

  Args:
    mesh: the devices.
    state: a tree of arrays.
    names: of the axes of every leaf, see `map_names`.
  """

  def one(names, leaf):
    return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh.shape))

  return map_names(one, names, state)


def _in_force():
  """Sizes of the axes of the mesh in force; None if nothing is to be split."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or all(size == 1 for size in mesh.axis_sizes):
    return None
  return dict(mesh.shape)


def platform(mesh: bool = True) -> str:
  """Where what is traced will run, as far as can be told: 'cpu', 'gpu', 'tpu'.

  The devices of the mesh in force, which may be those of another machine; else,
  or without `mesh`, JAX's default device; else its default backend.
  """
  there = jax.sharding.get_abstract_mesh().abstract_device if mesh else None
  device = there or jax.config.jax_default_device
  name = getattr(device, 'platform', device) or jax.default_backend()
  return 'gpu' if name in ('cuda', 'rocm') else name


def constrain(x, *names):
  """Lays an activation on the mesh in force; without one it is left alone."""
  sizes = _in_force()
  if sizes is None:
    return x
  spec = partition_spec(names, x.shape, sizes)
  return jax.lax.with_sharding_constraint(x, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight, names):
  kept = (None if RULES[name] == RULES['embed'] else name for name in names)
  return constrain(constrain(weight, *names), *kept)


def _gathered_forward(weight, names):
  return _gathered(weight, names), None


def _gathered_backward(names, _, grad):
  # Never whole: else it is summed whole over all devices, where each needs the
  # sum of its part, and those of all blocks are kept whole until the end.
  return (constrain(grad, *names),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def gathered(weight, *names):
  """A weight as a product reads it: whole along `fsdp`.

  That axis shares out what is kept, not what is done. Left to itself the
  partitioner sends the parts round in a ring instead, a product with a few
  columns at each stop: 256 of them on 256 devices, and minutes to compile.
  Under `remat` it is gathered again for the backward pass; without, the whole
  weights of all blocks are kept until then. Its gradient is scattered along
  `fsdp` as it is summed, and only parts are then summed along `data`.
  """
  return _gathered(weight, names)


def looked_up(table_VxD, ids_BxL):
  """Rows `BxLxD` of a table of 'vocab' and 'embed', every device its own.

  Each is given the whole table, and reads and adds up the gradient of its own
  ids before that is scattered. Left to the partitioner, each would look its
  columns up for the ids of all devices, and sort them all for the gradient: 1M
  on 256 chips. For fewer ids than it has rows the table is not sent whole.
  """
  mesh = _in_force()
  if mesh is None or ids_BxL.size < table_VxD.shape[0]:
    return jnp.take(table_VxD, ids_BxL, axis=0)
  parts = partition_spec(('vocab', 'embed'), table_VxD.shape, mesh)
  rows = partition_spec(('batch', 'length'), ids_BxL.shape, mesh)

  def own(table, ids):
    for axis, over in enumerate(parts):
      if over:
        table = jax.lax.all_gather(table, over, axis=axis, tiled=True)
    return jnp.take(table, ids, axis=0)

  return jax.shard_map(
    own,
    in_specs=(parts, rows),
    out_specs=PartitionSpec(*rows, None),
    check_vma=False,  # that all have the same table is not seen
  )(table_VxD, ids_BxL)


def constrain_tree(tree, names):
  """`constrain` for every leaf, see `map_names`."""
  return map_names(lambda names, x: constrain(x, *names), names, tree)


def ways(name: str) -> int:
  """Parts into which the mesh in force would like to split an axis."""
  mesh = _in_force() or {}
  return math.prod(mesh.get(axis, 1) for axis in RULES[name])


def repeats(name: str, size: int) -> int:
  """Devices that hold the same part of an axis that ought to be split.

  1 where the mesh in force divides the axis as its rule says, or there is none.
  """
  mesh = _in_force() or {}
  chosen = jax.tree.leaves(tuple(partition_spec((name,), (size,), mesh)))
  return ways(name) // math.prod(mesh[axis] for axis in chosen)


def by_shard(function, sizes, names_in, names_out):
  """A function that every device calls on its own part of the arguments.

  For what needs nothing from other parts, such as walks of a recurrence: the
  partitioner cannot look into a kernel, and need not guess at the others.
  Without a mesh it is the function itself.

  Args:
    function: of arrays, None or trees of them.
    sizes: logical axes that may be split -> their sizes. One that its mesh
      axes do not divide stays whole: every device then does all of it.
    names_in: of each argument, a prefix tree as `map_names` takes it.
    names_out: of the result.
  """
  mesh = _in_force()
  if mesh is None:
    return function
  split = dict(zip(sizes, partition_spec(tuple(sizes), sizes.values(), mesh)))
  # with axes of one device too: else gradients are summed over them, a copy
  alone = tuple(axis for axis, size in mesh.items() if size == 1)

  def spec(names):
    first, *rest = map(split.get, names)
    return PartitionSpec((*jax.tree.leaves(first), *alone), *rest)

  def specs(names):
    return jax.tree.map(spec, names, is_leaf=_is_names)

  return jax.shard_map(
    function,
    in_specs=specs(names_in),
    out_specs=specs(names_out),
    check_vma=False,  # kernels do not say what varies
  )
