"""Gradients of a chunk's gates, gathered and led back to their logits.

Gradients of a token's scalars are gathered as columns where they come from
maps and as rows where they come from gates, all of logarithms: every product
of gates is the exponential of a difference of `total` at two tokens, and its
gradient a difference of row and column sums.
"""

import jax
import jax.numpy as jnp

from nestax.models.memory.tile_ops import (
  ROWS,
  exact,
  iota,
  ones_triangle,
  stack_rows,
)


class Sums:
  """Gathers gradients of log gates: name -> `[C, 1]` and `[1, C]`."""

  def __init__(self):
    self.columns, self.rows = {}, {}

  def column(self, name: str, x_CxN) -> None:
    total = jnp.sum(x_CxN, axis=1, keepdims=True)
    self.columns[name] = self.columns.get(name, 0.0) + total

  def row(self, name: str, x_NxC) -> None:
    total = jnp.sum(x_NxC, axis=0, keepdims=True)
    self.rows[name] = self.rows.get(name, 0.0) + total

  def all_rows(self) -> dict[str, jax.Array]:
    """Everything as rows: one transposition."""
    names = list(self.columns)
    C = self.columns[names[0]].shape[0]
    lane = iota((C, ROWS), 1)
    turned = jnp.zeros((C, ROWS), self.columns[names[0]].dtype)
    for i, name in enumerate(names):
      turned = jnp.where(lane == i, self.columns[name], turned)
    turned = turned.T
    rows = dict(self.rows)
    for i, name in enumerate(names):
      rows[name] = rows.get(name, 0.0) + turned[i : i + 1]
    return rows


def gates_back(cfg, f, sums, d_kept, tokens):
  """Gradients of the logits from those of the gates' products."""
  C = f.q_CxK.shape[0]
  zero = jnp.zeros_like(f.rows['total'])
  d_last, d_g = sums['last'], sums.get('g', zero)
  d_row, d_minus = sums.get('row', zero), sums.get('minus', zero)
  end = jnp.sum(d_last, axis=1, keepdims=True) + d_kept
  at_end = iota(zero.shape, 1) == C - 1
  d_total = d_g - d_minus - d_last + d_row + jnp.where(at_end, end, 0.0)
  # total and before are sums of log alpha; before leaves out the token itself
  triangle = ones_triangle(C, d_total.dtype)
  stacked = stack_rows([d_total], d_total.dtype)
  d_alpha = exact(stacked, triangle, ((1,), (1,)))[0:1] - d_row
  d_eta = sums['eta'] + d_row
  if not cfg.retention:
    d_alpha = zero
  if tokens.marks_2xC is not None:
    live = tokens.marks_2xC[1:2] != 0
    d_alpha, d_eta = jnp.where(live, d_alpha, 0.0), jnp.where(live, d_eta, 0.0)
  d_log = stack_rows([d_eta, d_alpha], d_total.dtype)
  return d_log * jax.nn.sigmoid(-f.logit_8xC)
