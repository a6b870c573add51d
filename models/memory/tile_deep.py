"""A chunk with two-layer memories on tiles: `chunk.chunk_step`, any rule.

`M(z) = gelu(z A) O` with maps transposed as in `tile_front`. The first layers
have the keys of all other memories; each second layer has its own, the unit
vectors of `h = gelu(k A)`, and so its own triangular system. The walk back
takes the derivative of this function, see `tile_deep_backward`; for that every
memory is a tile of its own, and inverses may be handed in.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory import tile
from nestax.models.memory.tile_deep_ops import gelu, gelu_slope
from nestax.models.memory.tile_deep_write import (
  keys_steps,
  running_steps,
  write_gates,
  write_steps,
)
from nestax.models.memory.tile_front import (
  Front,
  Maps,
  State,
  front_steps,
  read,
)
from nestax.models.memory.tile_ops import columns_of, nt, unit_norm
from nestax.models.memory.types import MemoryConfig, inner_gain, outer_gain


class Memories(NamedTuple):
  """What `Maps` are, every memory by itself."""

  maps: dict[str, jax.Array]  # [K, K], or [K, F] of a first layer
  gates_8xK: jax.Array
  outer: dict[str, jax.Array]  # [F, K]


class Inverses(NamedTuple):
  """Of the systems of the keys and, by box, of second layers' keys."""

  T_CxC: jax.Array
  outer: dict[str, jax.Array]


class Saved(NamedTuple):
  """What the backward pass takes from the forward pass."""

  state: State  # at the chunk's start; maps in the matmuls' dtype
  inverses: Inverses | None  # None without `delta`


def apart(cfg: MemoryConfig, maps: Maps | None) -> Memories | None:
  if maps is None:
    return None
  K = maps.maps_KxM.shape[0]
  by_box = {box: maps.maps_KxM[:, columns_of(cfg, box, K)] for box in cfg.boxes}
  return Memories(by_box, maps.gates_8xK, maps.outer)


def together(cfg: MemoryConfig, memories: Memories | None) -> Maps | None:
  if memories is None:
    return None
  maps = jnp.concatenate([memories.maps[box] for box in cfg.boxes], axis=1)
  return Maps(maps, memories.gates_8xK, memories.outer)


def _map(slow: Memories, boundary: Memories, dtype, box, x, alive):
  """A memory without its residual, at the boundary."""
  y = read(x, slow.maps[box], boundary.maps[box], alive, dtype)
  if box not in slow.outer:
    return y
  return read(gelu(y), slow.outer[box], boundary.outer[box], alive, dtype)


def _errors_steps(cfg, f: Front, slow: Memories, boundary: Memories, dtype):
  """By box, inner gradients `[C, N]` and (key, gradient) of second layers.

  A generator of steps.
  """
  point = tile.inner_point(cfg, f.k_CxK, f.v_CxK)
  first, second = {}, {}
  for box in cfg.boxes:
    at = slow.maps[box], boundary.maps[box], f.alive_Cx1, dtype
    plain = cfg.objective == 'l2' and box in cfg.identity
    e = f.k_CxK - f.v_CxK if plain else -f.v_CxK
    if box not in cfg.deep:
      first[box] = e + read(point, *at)
      yield
      continue
    h, slope = gelu_slope(read(f.k_CxK, *at))
    yield
    p = h if cfg.objective == 'l2' else jnp.zeros_like(h)
    if cfg.generated:
      p = p - gelu(read(f.v_CxK, *at))
    yield
    W, D = slow.outer[box], boundary.outer[box]
    e = e + read(p, W, D, f.alive_Cx1, dtype)
    yield
    below = slope * _read_back(e, W, D, f.alive_Cx1, dtype)
    above = e
    if cfg.bounded:
      above, below = e / outer_gain(h), below / inner_gain(e, below)
    yield
    first[box], second[box] = below, (unit_norm(h)[0], above)
  return first, second


def _read_back(e, slow, fast, alive, dtype):
  """`(W + D)^T e`, the same of the other side."""
  if alive is None:
    return nt(e, slow + fast, dtype)
  return nt(e, slow, dtype) + alive * nt(e, fast, dtype)


def chunk_steps(
  cfg, slow: Memories, bias_8xC, state: State, tokens, inverses, dtype
):
  """Advances one head by a chunk: a generator, see `steps`.

  Args:
    cfg: the rule.
    slow: initial values; slow gates too.
    bias_8xC: of the gates.
    state: fast parts at the chunk's start, as Memories.
    tokens: inputs.
    inverses: of the chunk's systems; None where they are to be found.
    dtype: of the matmuls' operands.

  Returns:
    ((State after it, output `[C, K]` float32), Inverses or None).
  """
  boundary, running, momentum = state
  at = running if boundary is None else boundary
  maps = functools.partial(_map, slow, at, dtype)
  f = yield from front_steps(cfg, slow, bias_8xC, at, tokens, dtype, maps)
  yield
  none = Inverses(None, dict.fromkeys(cfg.deep))
  T, T_outer = inverses or none
  first, second = yield from _errors_steps(cfg, f, slow, at, dtype)
  keys = yield from keys_steps(cfg, f, f.k_CxK, T, dtype)
  found, of_gates = {}, write_gates(cfg, f, keys, slow, at, state, dtype)
  yield
  written, outer, keys_of = {}, {}, {}
  for box in cfg.boxes:
    S = momentum and momentum.maps[box]
    written[box] = yield from write_steps(
      cfg, f, keys, slow.maps[box], running.maps[box], S, first[box], dtype
    )
  for box in cfg.deep:
    key, e = second[box]
    own = yield from keys_steps(cfg, f, key, T_outer[box], dtype)
    S = momentum and momentum.outer[box]
    outer[box] = yield from write_steps(
      cfg, f, own, slow.outer[box], running.outer[box], S, e, dtype
    )
    keys_of[box], found[box] = own, own.T_CxC

  if cfg.read == 'boundary':
    out = _map(slow, at, dtype, 'mem', f.q_CxK, f.alive_Cx1)
  else:
    out = yield from running_steps(
      cfg, f, keys, written['mem'][0], f.q_CxK, dtype
    )
    if 'mem' in cfg.deep:
      out = yield from running_steps(
        cfg, f, keys_of['mem'], outer['mem'][0], gelu(out), dtype
      )
  yield
  if 'mem' in cfg.identity:
    out = out + f.q_CxK

  def after(i):
    return Memories(
      {box: new[i] for box, new in written.items()},
      of_gates[i - 1],
      {box: new[i] for box, new in outer.items()},
    )

  pushed = after(2) if cfg.momentum else None
  new = State(tile.boundary_after(boundary, f.rows), after(1), pushed)
  return (new, out), Inverses(keys.T_CxC, found) if cfg.delta else None


def forward_steps(cfg, slow: Maps, bias_8x1, state: State, tokens, dtype):
  """`tile.forward_steps` for any rule."""
  (new, out), inverses = yield from chunk_steps(
    cfg, apart(cfg, slow), bias_8x1, State(*(apart(cfg, x) for x in state)),
    tokens, None, dtype,
  )  # fmt: skip
  saved = Saved(tile.narrow(state, dtype), inverses)
  return State(*(together(cfg, x) for x in new)), out, saved
