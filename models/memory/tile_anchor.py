"""Retention towards zero in a chunk of tiles: what is left of slow values.

With `a` what the forget gate has left of the initial value W since the chunk,
or a document in it, began, a memory is `a W` where it is W otherwise: the fast
part after a chunk has `(a_C - 1) W` more, the system `a_p W k` on its right
side (`_p`: up to the token before), and the output `a W q`.
"""

import jax

from nestax.models.memory.tile_front import Front, Maps
from nestax.models.memory.tile_ops import adaptive, nn, nt
from nestax.models.memory.types import MemoryConfig


def own(cfg: MemoryConfig, slow: Maps) -> Maps:
  """The slow values that memories start from."""
  return slow._replace(gates_8xK=adaptive(cfg, slow.gates_8xK))


def add_side(cfg: MemoryConfig, f: Front, side, slow_KxK, k, dtype):
  """To one map's right side of the system, over -eta, `[C, K]`."""
  if cfg.anchor != 'zero':
    return side
  return side + f.columns['anchor_p'] * nn(k, slow_KxK, dtype)


def add_gate_side(cfg: MemoryConfig, f: Front, side, slow: Maps, k, dtype):
  """The same of the gates, `[8, C]`, not over -eta."""
  if cfg.anchor != 'zero':
    return side
  read = nt(own(cfg, slow).gates_8xK, k, dtype)
  return side - f.rows['eta'] * f.rows['anchor_p'] * read


def read(cfg: MemoryConfig, f: Front, slow_KxK, q, dtype):
  """What the output reads of the slow values of `mem`, `[C, K]`."""
  out = nn(q, slow_KxK, dtype)
  return f.columns['anchor'] * out if cfg.anchor == 'zero' else out


def after(cfg: MemoryConfig, f: Front, slow: Maps, new: Maps) -> Maps:
  """The fast part after the chunk, with what the slow values have lost."""
  if cfg.anchor != 'zero':
    return new
  lost = f.rows['anchor'][:, -1:] - 1.0
  return jax.tree.map(lambda x, W: x + lost * W, new, own(cfg, slow))
