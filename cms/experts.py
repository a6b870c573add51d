"""Low-rank expert slots of a level: the room that sleep grows into.

`y(x) = sum over active s of w_s (x A_s) B_s`, added to the level's own output
for the same normalised input (Sleep section 3.2). Slots are allocated at the
start and masked: activation changes no shape and, B being zero at birth, no
output.

The router's weight is an independent gate `w_s = 2 sigmoid(logit_s)`, 1 at
birth, and not the softmax of design and paper: a softmax over the active slots
takes weight away from the older ones when one more is activated, so that
growth would change outputs by itself.

How a level calls this. Shared slots are parameters beside the level's kernels,
`slots/{a,b,logit,active}` (logical axes `(None, 'embed', 'memory')`,
`(None, 'memory', 'embed')`, `(None,)`, `(None,)`; initial values normal of
`D ** -0.5`, zeros, zeros, zeros; float32):

    slots = experts.Slots(a, b, logit, active)
    y_BxLxD = y_BxLxD + experts.read(slots, key_BxLxD, dtype)

with or without a delta, and for every token. An owner's slots are in the state
and have a leading batch axis; `read` sees it by the rank. `active` gets no
gradient; an optimiser that decays weights has to leave `active`, `logit` and
slots that are not trained alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.cms.level import Theta


class SlotsError(ValueError):
  """There is no slot to use, or slots cannot be what is asked of them."""


class Slots(NamedTuple):
  """S slots of rank r of one level, float32.

  Any leading axes are of things that have slots of their own: sequences
  (owners), or blocks stacked as the parameters are.
  """

  a_SxDxR: jax.Array
  b_SxRxD: jax.Array
  logit_S: jax.Array
  active_S: jax.Array  # 1 or 0


def init(key, S: int, D: int, r: int, leading: tuple[int, ...] = ()) -> Slots:
  """All slots masked, and empty.

  Raises:
    SlotsError: for no slots, or a rank that is not 1 to D.
  """
  if S < 1 or not 1 <= r <= D:
    raise SlotsError(
      f'{S} slots of rank {r} for a level of width {D}: at least one slot, of '
      f'a rank from 1 to {D}'
    )
  return Slots(
    a_SxDxR=jax.random.normal(key, (*leading, S, D, r)) * D**-0.5,
    b_SxRxD=jnp.zeros((*leading, S, r, D), jnp.float32),
    logit_S=jnp.zeros((*leading, S), jnp.float32),
    active_S=jnp.zeros((*leading, S), jnp.float32),
  )


def weights(slots: Slots):
  """The router's weight of every slot, 0 where it is masked."""
  gate_S = 2 * jax.nn.sigmoid(slots.logit_S)
  return jnp.where(_on(slots), gate_S, 0.0)


def _on(slots: Slots):
  return jax.lax.stop_gradient(slots.active_S) > 0


def factors(slots: Slots):
  """The active slots as two matrices, `[..., D, S r]` and `[..., S r, D]`.

  Masked slots are zeros there whatever they hold, NaN included, and get a
  gradient of exactly zero.
  """
  *leading, S, D, r = slots.a_SxDxR.shape
  on = _on(slots)[..., None, None]
  a = jnp.where(on, slots.a_SxDxR, 0.0)
  b = jnp.where(on, weights(slots)[..., None, None] * slots.b_SxRxD, 0.0)
  a = jnp.moveaxis(a, -3, -2).reshape(*leading, D, S * r)
  return a, b.reshape(*leading, S * r, D)


def read(slots: Slots, x_BxLxD, dtype):
  """What the active slots add to the level's output.

  Args:
    slots: of one block; with a leading `[B]` they are each sequence's own.
    x_BxLxD: the level's normalised input.
    dtype: of the matmuls' operands and of the result.
  """
  a, b = (w.astype(dtype) for w in factors(slots))
  own = 'b' if a.ndim == 3 else ''
  x = x_BxLxD.astype(dtype)
  h = jnp.einsum(f'bld,{own}dh->blh', x, a)
  return jnp.einsum(f'blh,{own}hd->bld', h, b)


def spare(slots: Slots) -> int:
  """The first slot that is masked everywhere, on concrete arrays.

  Raises:
    SlotsError: if there is none.
  """
  active = np.asarray(slots.active_S) > 0
  S = active.shape[-1]
  free_S = ~active.reshape(-1, S).any(0)
  if not free_S.any():
    raise SlotsError(
      f'all {S} expert slots of the level are used up: merge them into the '
      'level (experts.fold), free those of an earlier sleep, or begin with a '
      'model of more (cms.slots)'
    )
  return int(free_S.argmax())


def activate(slots: Slots, index) -> Slots:
  """Unmasks one slot, empty; outputs keep every bit.

  Args:
    slots: with any leading axes, all of which get the slot.
    index: of the slot, which is masked; an int or a traced scalar.
  """
  chosen_S = jnp.arange(slots.active_S.shape[-1]) == index
  chosen_S = jnp.broadcast_to(chosen_S, slots.active_S.shape)
  return slots._replace(
    # what a slot that was masked by hand still holds must not come back
    b_SxRxD=jnp.where(chosen_S[..., None, None], 0.0, slots.b_SxRxD),
    logit_S=jnp.where(chosen_S, 0.0, slots.logit_S),
    active_S=jnp.where(chosen_S, 1.0, slots.active_S),
  )


def free(slots: Slots, which_S, key) -> Slots:
  """Empties slots and masks them; nothing of what they held is left.

  Args:
    slots: with any leading axes.
    which_S: bool, broadcast against `active_S`: which ones.
    key: of their new first factors.
  """
  *leading, S, D, r = slots.a_SxDxR.shape
  fresh = init(key, S, D, r, tuple(leading))
  which_S = jnp.broadcast_to(which_S, slots.active_S.shape)

  def one(new, old):
    extra = (1,) * (old.ndim - which_S.ndim)
    return jnp.where(which_S.reshape(*which_S.shape, *extra), new, old)

  return jax.tree.map(one, fresh, slots)


class Fold(NamedTuple):
  """What folding slots into a level gave."""

  theta: Theta
  error: jax.Array  # of the slots' output on `held`, relative: 0 none, 1 all


def hidden(theta: Theta, x_TxD):
  """The level's hidden activations, float32."""
  gate = x_TxD @ theta.gate_DxF
  return jax.nn.silu(gate) * (x_TxD @ theta.up_DxF)


def fold(
  theta: Theta, slots: Slots, x_TxD, held_TxD, ridge: float = 1e-4
) -> Fold:
  """Folds the active slots of one block into its level's `down`.

  A low-rank linear map is no SwiGLU of the same width: what is linear in x
  cannot be had exactly from products of a SiLU and a linear map. So `down`
  takes up the map as far as the hidden activations can express it on given
  inputs (ridge regression), and the rest is reported, not hidden: the caller
  decides if the error is small enough, then frees the slots.

  Args:
    theta: the level's weights.
    slots: without leading axes.
    x_TxD: normalised inputs of the level to fit on, best some times as many
      as its hidden width.
    held_TxD: other inputs, to measure the error on.
    ridge: relative to the mean square of the hidden activations.

  Returns:
    The new weights, and the norm of what is missing on `held_TxD` over the
    norm of what the slots said there (0 where they said nothing).
  """
  theta = Theta(*(w.astype(jnp.float32) for w in theta))
  a, b = factors(slots)
  x_TxD, held_TxD = (x.astype(jnp.float32) for x in (x_TxD, held_TxD))
  h_TxF, y_TxD = hidden(theta, x_TxD), (x_TxD @ a) @ b
  gram_FxF = h_TxF.T @ h_TxF
  F = gram_FxF.shape[0]
  least = ridge * jnp.trace(gram_FxF) / F + jnp.finfo(jnp.float32).tiny
  system = gram_FxF + least * jnp.eye(F)
  add_FxD = jax.scipy.linalg.solve(system, h_TxF.T @ y_TxD, assume_a='pos')
  want_TxD = (held_TxD @ a) @ b
  rest = jnp.linalg.norm(hidden(theta, held_TxD) @ add_FxD - want_TxD)
  size = jnp.linalg.norm(want_TxD)
  # what is not a number has not been expressed
  error = jnp.where(size == 0, 0.0, rest / jnp.where(size == 0, 1.0, size))
  return Fold(theta._replace(down_FxD=theta.down_FxD + add_FxD), error)
