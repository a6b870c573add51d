"""The backward pass of `tile_anchor`, by hand."""

import jax
import jax.numpy as jnp

from nestax.models.memory import tile_anchor
from nestax.models.memory.tile_adjoint import Chunk, Gathered, entries
from nestax.models.memory.tile_front import Maps
from nestax.models.memory.tile_ops import iota, nn, nt, outer, tn


def output_back(c: Chunk, d: Gathered, d_out) -> None:
  """From the output's read of the slow values of `mem`."""
  q, slow_KxK = c.f.q_CxK, c.slow.maps_KxM[:, c.mem]
  if c.cfg.anchor == 'zero':
    d_out = c.f.columns['anchor'] * d_out
  d_q = nt(d_out, slow_KxK, c.dtype)
  if c.cfg.anchor == 'zero':
    d.sums.column('anchor', q * d_q)
  d.q = d.q + d_q
  d.slow['mem'] = tn(q, d_out, c.dtype)


def back(c: Chunk, d: Gathered, d_new: Maps, d_rhs, d_rhs_g) -> Maps:
  """Gradients of slow values by the system and by the fast part at the end.

  Args:
    c: the chunk.
    d: where gradients are gathered.
    d_new: of the fast part after the chunk.
    d_rhs, d_rhs_g: of the system's right sides, `[C, M]` and `[8, C]`; None
      where there is no system.
  """
  own, k = tile_anchor.own(c.cfg, c.slow), c.f.k_CxK
  end = c.f.rows['anchor'][:, -1:]
  at_end = iota(c.f.rows['anchor'].shape, 1) == k.shape[0] - 1
  d_end = end * entries(d_new, own)
  d.sums.row('anchor', jnp.where(at_end, d_end, 0.0))
  d_slow = jax.tree.map(lambda x: (end - 1.0) * x, d_new)
  if d_rhs is None:
    return d_slow
  left = c.f.columns['anchor_p']
  x, x_g = -c.f.columns['eta'] * d_rhs, -c.f.rows['eta'] * d_rhs_g
  d_key, of_g = left * nt(x, own.maps_KxM, c.dtype), c.f.rows['anchor_p'] * x_g
  by_gates = of_g * nt(own.gates_8xK, k, c.dtype)
  for name in ('eta', 'anchor_p'):
    d.sums.column(name, d_key * k)
    d.sums.row(name, by_gates)
  d.k = d.k + d_key + outer(of_g, own.gates_8xK)
  by_reads = Maps(tn(left * k, x, c.dtype), nn(of_g, k, c.dtype))
  return jax.tree.map(jnp.add, d_slow, by_reads)
