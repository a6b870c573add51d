"""Gradients of a chunk's gates, gathered and led back to their logits.

Gradients of a token's scalars are gathered as columns where they come from
maps and as rows where they come from gates, all of logarithms: every product
of gates is the exponential of a difference of `total` at two tokens, and its
gradient a difference of row and column sums.
"""

import jax
import jax.numpy as jnp

from nestax.models.memory.decay import LEAST_ETA
from nestax.models.memory.tile_front import (
  handed,
  handed_rows,
  own_triangle,
)
from nestax.models.memory.tile_ops import (
  columns_as_rows,
  exact,
  iota,
  ones_triangle,
  stack_rows,
)
from nestax.models.memory.types import GATES


class Sums:
  """Gathers gradients of log gates: name -> `[C, 1]` and `[1, C]`."""

  def __init__(self):
    self.wide, self.rows = {}, {}

  def column(self, name: str, x_CxN) -> None:
    # lanes are summed once, of all that is gathered by then
    key = name, x_CxN.shape[1]
    self.wide[key] = self.wide.get(key, 0.0) + x_CxN

  def row(self, name: str, x_NxC) -> None:
    total = jnp.sum(x_NxC, axis=0, keepdims=True)
    self.rows[name] = self.rows.get(name, 0.0) + total

  def all_rows(self) -> dict[str, jax.Array]:
    """Everything as rows."""
    rows, columns = dict(self.rows), {}
    for (name, _), x_CxN in self.wide.items():
      total = jnp.sum(x_CxN, axis=1, keepdims=True)
      columns[name] = columns.get(name, 0.0) + total
    for name, row in columns_as_rows(columns).items():
      rows[name] = rows.get(name, 0.0) + row
    return rows


def gates_back(cfg, f, sums, d_kept, d_kept_b, tokens):
  """Gradients of the logits from those of the gates' products.

  Args:
    cfg: the rule.
    f: Front of the chunk.
    sums: rows of what was gathered.
    d_kept: of the logarithm of what a chunk leaves of the fast parts.
    d_kept_b: the same of the momentum; None without.
    tokens: of the chunk.

  Returns:
    (of the gates' logits `[8, C]`, of the gates handed in `[R, C]` or None).
  """
  C = f.q_CxK.shape[0]
  zero = jnp.zeros_like(f.rows['total'])
  d_last, d_g = sums.get('last', zero), sums.get('g', zero)
  d_row, d_minus = sums.get('row', zero), sums.get('minus', zero)
  d_before = d_row + sums.get('before', zero)
  d_totals = [_at_end(d_g - d_minus - d_last + d_before, d_last, d_kept)]
  if d_kept_b is not None:
    d_total = sums['total_b'] - sums['minus_b'] - sums['last_b']
    d_totals.append(_at_end(d_total, sums['last_b'], d_kept_b))
  # total and before are sums of log alpha; before leaves out the token itself
  triangle = ones_triangle(C, d_g.dtype)
  stacked = stack_rows(d_totals, d_g.dtype)
  by_gate = exact(stacked, triangle, ((1,), (1,)))
  d_alpha = by_gate[0:1] - d_before + sums.get('alpha', zero)
  if cfg.anchor == 'zero':
    d_left_p = sums.get('anchor_p', zero)
    if tokens.marks_2xC is not None:
      triangle = own_triangle(f.rows, d_g.dtype)
    d_left = stack_rows([sums.get('anchor', zero) + d_left_p], d_g.dtype)
    by_left = exact(d_left, triangle, ((1,), (1,)))[0:1]
    d_alpha = d_alpha + by_left - d_left_p
  d_eta = sums['eta'] + d_row
  if not cfg.retention:
    d_alpha = zero
  if tokens.marks_2xC is not None:
    live = tokens.marks_2xC[1:2] != 0
    d_alpha, d_eta = jnp.where(live, d_alpha, 0.0), jnp.where(live, d_eta, 0.0)
  d_own = [
    zero if gate in cfg.given else d for gate, d in zip(GATES, (d_eta, d_alpha))
  ]
  d_log = stack_rows(d_own, d_g.dtype)
  d_logit = d_log * jax.nn.sigmoid(-f.logit_8xC)
  by_name = {'alpha': d_alpha, 'beta': by_gate[1:2]}
  if 'eta' in cfg.given:
    eta = handed_rows(cfg, tokens)['eta']
    by_name['eta'] = d_eta / jnp.maximum(eta, LEAST_ETA)
  d_handed = [by_name[name] for name in handed(cfg)]
  return d_logit, jnp.concatenate(d_handed) if d_handed else None


def _at_end(d_total, d_last, d_kept):
  """Adds what reaches the chunk's last sum: all that the end kept."""
  end = jnp.sum(d_last, axis=1, keepdims=True) + d_kept
  at_end = iota(d_total.shape, 1) == d_total.shape[1] - 1
  return d_total + jnp.where(at_end, end, 0.0)
