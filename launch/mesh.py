"""The device mesh of a run, and what is laid on it."""

import math
import os
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nestax.models import axes

# `mesh.fsdp` = 0 takes as many: at 256, D = 2048 leaves 8 columns a device.
MOST_FSDP = 16

# A device waits in each of the collectives that run at once; two are common.
THREADS = 4

# What the logical axes are that split parameters.
SAID = {
  'embed': 'model width (model.D)',
  'heads': 'heads',
  'kv_heads': 'key and value heads (model.G)',
  'memory_rows': 'rows of memories',
  'mlp': 'hidden width of MLPs',
  'vocab': 'vocabulary (model.V)',
}


class MeshError(ValueError):
  """The mesh of the config does not fit the devices or the batch."""


def spare_threads(devices: int = 0) -> None:
  """Gives each device that a CPU simulates threads to wait in.

  XLA has one a device. All-reduces that do not depend on each other may run at
  once, on some devices one and on some the other: they then wait for threads
  that neither has, and after 40 seconds XLA ends the process.

  Call it before JAX looks for devices. A NPROC that is set stays.

  Args:
    devices: that are simulated; 0 for as many as the environment asks for.
  """
  asked = re.findall(
    r'--xla_force_host_platform_device_count=(\d+)',
    os.environ.get('XLA_FLAGS', ''),
  )
  asked += [os.environ.get('JAX_NUM_CPU_DEVICES') or 0]
  devices = devices or max(map(int, asked))
  if devices > 1:
    threads = max(THREADS * devices, os.cpu_count() or 1)
    os.environ.setdefault('NPROC', str(threads))


def make(sizes, rows: int, length: int, devices=None) -> Mesh:
  """Makes the mesh of `config.mesh`.

  Args:
    sizes: `data`, `fsdp`, `tensor`, `sequence` -> devices along that axis;
      -1, for at most one of them, takes all that are left. `fsdp` of 0 takes
      its own out of `data`'s: their greatest common divisor with MOST_FSDP.
    rows: global rows of a microbatch, split over `data` and `fsdp`.
    length: tokens a row, split over `sequence`.
    devices: all there are, here or elsewhere; this machine's if not given.

  Raises:
    MeshError: if the sizes and the devices, or the batch, do not fit.
  """
  sizes = {name: sizes[name] for name in axes.MESH_AXES}
  devices = jax.devices() if devices is None else list(devices)
  shared = sizes['fsdp'] == 0
  sizes['fsdp'] += shared
  if any(n < 1 and n != -1 for n in sizes.values()):
    raise MeshError(
      f'mesh sizes are {sizes}: each has to be -1 or at least 1; fsdp may be 0'
    )
  free = [name for name, n in sizes.items() if n == -1]
  if len(free) > 1:
    raise MeshError(f'mesh sizes {" and ".join(free)} are -1: one at most')
  used = math.prod(n for n in sizes.values() if n != -1)
  if free:
    if len(devices) % used:
      raise MeshError(
        f'mesh.{free[0]} = -1 shares {len(devices)} devices out by {used}: the '
        f'other mesh sizes {sizes} have to multiply to a divisor of it'
      )
    sizes[free[0]] = max(len(devices) // used, 1)
    used *= sizes[free[0]]
  if shared:
    sizes['fsdp'] = math.gcd(sizes['data'], MOST_FSDP)
    sizes['data'] //= sizes['fsdp']
  # One process may leave devices idle (a test, a comparison); many may not.
  if used > len(devices) or (used < len(devices) and jax.process_count() > 1):
    raise MeshError(
      f'mesh sizes {sizes} take {used} devices, and there are {len(devices)}'
    )
  _check_batch(sizes, rows, length)
  # Auto: the partitioner decides.
  return Mesh(
    _laid(tuple(sizes.values()), devices[:used]),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
  )


def _laid(shape: tuple[int, ...], devices: list) -> np.ndarray:
  """The devices in the shape of a mesh, neighbours near each other."""
  slices = {getattr(device, 'slice_index', 0) for device in devices}
  if len(slices) > 1:
    raise MeshError(
      f'the devices are of {len(slices)} TPU slices: a run takes one'
    )
  # `jax.make_mesh` cuts no axis of the wires in two, unless on v5e: 16 by 16
  # devices then do not fit 8 x 8 x 4.
  return mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )


def _check_batch(sizes, rows: int, length: int) -> None:
  ways = sizes['data'] * sizes['fsdp']
  if rows % ways:
    raise MeshError(
      f'a microbatch has {rows} rows (train.batch / train.accumulate), which '
      f'{ways} devices along data and fsdp cannot share: use a multiple of '
      f'{ways}, or {_lower(sizes, rows)}'
    )
  if length % sizes['sequence']:
    raise MeshError(
      f'data.length is {length}: mesh.sequence = {sizes["sequence"]} has to '
      'divide it'
    )


def _lower(sizes, rows: int) -> str:
  """What else may be done where so many rows are too few, in words."""
  data, fsdp = sizes['data'], sizes['fsdp']
  most = math.gcd(rows, data * fsdp)
  wide = math.gcd(fsdp, most)
  ways, tensor = data * fsdp // most, sizes['tensor']
  return (
    f'let {ways} devices share a row: mesh.data={most // wide}, '
    f'mesh.fsdp={wide}, mesh.tensor={tensor * ways}'
  )


def check_params(mesh: Mesh, params_boxed) -> None:
  """Refuses an axis whose devices would all hold and do the same.

  Args:
    mesh: the devices.
    params_boxed: parameters or their shapes with logical axes.

  Raises:
    MeshError: if `fsdp` or `tensor` can split no parameter.
  """
  used = set()
  for sharding in jax.tree.leaves(axes.shardings(mesh, params_boxed)):
    used.update(jax.tree.leaves(tuple(sharding.spec)))
  for axis in ('fsdp', 'tensor'):
    if mesh.shape[axis] > 1 and axis not in used:
      raise MeshError(
        f'mesh.{axis} = {mesh.shape[axis]} divides none of the sizes of the '
        f'model that it could: {_sizes(axis, params_boxed)}; its devices would '
        f'all do the same: use a divisor of one of these, or mesh.{axis} = 1'
      )


def _sizes(axis: str, params_boxed) -> str:
  """The sizes of parameters that an axis of a mesh may split, in words."""
  boxed = jax.tree.leaves(params_boxed, is_leaf=lambda x: hasattr(x, 'names'))
  found = {}
  for leaf in boxed:
    for name, size in zip(getattr(leaf, 'names', ()), leaf.value.shape):
      if axis in axes.RULES.get(name, ()):
        found.setdefault(name, set()).add(size)
  return ', '.join(
    f'{SAID.get(name, name)} {" and ".join(map(str, sorted(sizes)))}'
    for name, sizes in sorted(found.items())
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


class Part(NamedTuple):
  """Rows of a global batch that the devices of this process hold."""

  count: int  # rows of the global batch
  rows: np.ndarray  # their numbers, rising


def part(mesh: Mesh, count: int) -> Part:
  """Finds the rows that this process has to read of batches of `count` rows.

  Processes along `tensor` and `sequence` hold, and read, the same rows.
  """
  sharding = axes.batch_sharding(mesh, 1)
  held = sharding.addressable_devices_indices_map((count,)).values()
  numbers = np.arange(count)
  return Part(count, np.unique(np.concatenate([numbers[i] for i in held])))


def put(mesh: Mesh, batch, part: Part):
  """Puts the rows that this process read on its devices, as global arrays."""
  sharding = axes.batch_sharding(mesh)

  def laid(array):
    def piece(index):
      rows, columns = index
      numbers = np.arange(*rows.indices(part.count))
      return array[np.searchsorted(part.rows, numbers), columns]

    shape = (part.count, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, piece)

  return {name: laid(array) for name, array in batch.items()}


def like_params(mesh: Mesh, params_boxed, tree):
  """Shardings for a tree that holds copies of the parameters, such as Adam's.

  A leaf goes where the parameter goes whose path its own path ends in, if the
  two have one shape; everything else (counters, factored moments) is whole on
  every device.

  Args:
    mesh: the devices.
    params_boxed: parameters or their shapes with logical axes.
    tree: arrays or shapes.
  """
  layout = axes.shardings(mesh, params_boxed)
  abstract = nn.unbox(params_boxed)
  leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
  known = {
    path: (leaf.shape, sharding)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(layout))
  }

  def one(path, leaf):
    for start in range(len(path)):
      shape, sharding = known.get(path[start:], (None, None))
      if shape == leaf.shape:
        return sharding
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(one, tree)
