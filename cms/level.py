"""One level of the continuum: its weights, what it has learned, its commits.

A level's weights are `theta_0 + kept * delta`: slow parameters, and what one
sequence has written on them (NL Eq. 70-71). Everything below `read` has a
leading axis `n` of the blocks that the level stands in and an axis `B` of
sequences; a gate `kept_B` of 0 says that a document's start has emptied the
level since its last commit, so that a slow level need not be rewritten inside
the scan of a faster one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nestax.cms import update
from nestax.cms.update import UpdateConfig


class Theta(NamedTuple):
  """The weights of one level's gated MLP (SwiGLU), or a change of them.

  Slow weights have the shapes named here, what a sequence has written on them
  a leading `[B]`, and a state the leading `[n, B]`.
  """

  gate_DxF: jax.Array
  up_DxF: jax.Array
  down_FxD: jax.Array


class Own(NamedTuple):
  """A level's weights of each sequence, slow ones and writes added up.

  In the dtype of the matmuls, with a leading `[B]`; gate and up in one array,
  since they multiply the same.
  """

  both_Dx2xF: jax.Array
  down_FxD: jax.Array


class Writes(NamedTuple):
  """A level's weights before each of `m` periods, constants all.

  `scale_n` is 1; its derivative is that of what was written by the level's
  rate, to which every step is proportional.
  """

  scale_n: jax.Array
  own: Any  # an Own, `[n, m, B, ...]`


class LevelState(NamedTuple):
  """What one level of every sequence carries, float32 unless said."""

  delta: Theta  # [n, B, ...] written so far
  kept_B: jax.Array  # 1, or 0 if a document has started since the last commit
  total: Theta | None  # gradients summed since the last commit; None: 0
  count_B: jax.Array  # scored tokens in `total`
  moment: Theta | None  # momentum of the inner optimiser
  origin: Theta | None  # nested: the delta that a slower commit goes back to
  origin_total: Theta | None  # nested: gradients since that slower commit
  origin_count_B: jax.Array | None
  commits_B: jax.Array  # int32, commits that have written something
  moved_B: jax.Array  # Frobenius norm of the last update


def init_state(
  cfg: UpdateConfig, n: int, B: int, D: int, F: int, nested: bool
) -> LevelState:
  """A level that has learned nothing; `nested` if a slower one holds it."""

  def zeros():
    return Theta(
      jnp.zeros((n, B, D, F), jnp.float32),
      jnp.zeros((n, B, D, F), jnp.float32),
      jnp.zeros((n, B, F, D), jnp.float32),
    )

  zero_B = jnp.zeros((B,), jnp.float32)
  return LevelState(
    delta=zeros(),
    kept_B=jnp.ones((B,), jnp.float32),
    total=zeros(),
    count_B=zero_B,
    moment=zeros() if cfg.remembers else None,
    origin=zeros() if nested else None,
    origin_total=zeros() if nested else None,
    origin_count_B=zero_B if nested else None,
    commits_B=jnp.zeros((B,), jnp.int32),
    moved_B=zero_B,
  )


def rows(x_B, like):
  """Shapes `[B]` to multiply leaves `[n, B, ...]`."""
  return x_B.reshape((1, -1) + (1,) * (like.ndim - 2))


def scaled(tree, x_B):
  """Every leaf `[n, B, ...]` times its sequence's number."""
  return jax.tree.map(lambda x: x * rows(x_B, x), tree)


def weights(state: LevelState) -> Theta:
  """What is added to the slow weights, `[n, B, ...]`."""
  return scaled(state.delta, state.kept_B)


def where_rows(mask_B, new, old):
  """Leaves `[n, B, ...]` or `[B]` of `new` where the mask says so."""

  def one(a, b):
    shape = (-1,) if a.ndim == 1 else (1, -1) + (1,) * (a.ndim - 2)
    return jnp.where(mask_B.reshape(shape), a, b)

  return jax.tree.map(one, new, old)


def forget(state: LevelState, mask_B) -> LevelState:
  """Empties the level where a document starts; its initial value stays."""
  alive_B = 1.0 - mask_B.astype(jnp.float32)
  nested = state.origin is not None
  return state._replace(
    kept_B=state.kept_B * alive_B,
    total=state.total and scaled(state.total, alive_B),
    count_B=state.count_B * alive_B,
    origin=scaled(state.origin, alive_B) if nested else None,
    origin_total=scaled(state.origin_total, alive_B) if nested else None,
    origin_count_B=state.origin_count_B * alive_B if nested else None,
  )


def accumulate(state: LevelState, grads, count_B, mask_B=None) -> LevelState:
  """Adds a chunk's gradient, a sum over its scored tokens, to the total.

  `mask_B` are the sequences that are asked; None for all.
  """
  state = count(state, count_B, mask_B)
  grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  if mask_B is not None:
    # `where`, not a product: 0 * inf would spoil a sequence that is not asked
    grads = where_rows(mask_B, grads, jax.tree.map(jnp.zeros_like, grads))
  total = state.total
  state = state._replace(
    total=jax.tree.map(jnp.add, total, grads) if total else grads
  )
  if state.origin is None:
    return state
  return state._replace(
    origin_total=jax.tree.map(jnp.add, state.origin_total, grads)
  )


def count(state: LevelState, count_B, mask_B=None) -> LevelState:
  """Counts a chunk's scored tokens, whose gradient may follow later."""
  if mask_B is not None:
    count_B = count_B * mask_B.astype(jnp.float32)
  state = state._replace(count_B=state.count_B + count_B)
  if state.origin is None:
    return state
  return state._replace(origin_count_B=state.origin_count_B + count_B)


def commit(
  cfg: UpdateConfig, state: LevelState, rate_n, due_B=None
) -> LevelState:
  """Writes what was gathered where it is due (NL Eq. 71).

  The total is divided by its scored tokens. A sequence that has gathered
  nothing, or something that is not finite, keeps its weights.

  Args:
    cfg: the inner optimiser.
    state: the level.
    rate_n: inner learning rate of each block.
    due_B: which sequences commit; None for all, whose total is then None.
  """
  grads = scaled(state.total, 1.0 / jnp.maximum(state.count_B, 1.0))
  finite_B = jnp.isfinite(norm(grads))
  writes_B = (state.count_B > 0) & finite_B
  if due_B is not None:
    writes_B = due_B & writes_B
  none = jax.tree.map(jnp.zeros_like, grads)
  grads = where_rows(writes_B, grads, none)
  moment = state.moment and scaled(state.moment, state.kept_B)
  step, new = update.step(cfg, moment, grads, rate_n)
  step = where_rows(writes_B, step, none)
  # not `state.moment`, which a document's start may have emptied
  moment = moment and where_rows(writes_B, new, moment)
  done = state._replace(
    delta=jax.tree.map(jnp.add, weights(state), step),
    kept_B=jnp.ones_like(state.kept_B),
    total=None,
    count_B=jnp.zeros_like(state.count_B),
    moment=moment,
    commits_B=state.commits_B + writes_B.astype(jnp.int32),
    moved_B=jnp.where(writes_B, norm(step), 0.0),
  )
  if due_B is None:
    return done
  return where_rows(due_B, done._replace(total=none), state)


def restart(
  cfg: UpdateConfig, state: LevelState, rate_n, due_B=None
) -> LevelState:
  """Nested: moves the level's origin, and the level back to it (NL Eq. 72).

  Called where the next slower level commits. The origin descends the mean of
  the gradients that the level has met since then, taken where it stood at the
  time (first-order meta-learning), with plain steps of its own rate.
  """
  if state.origin is None:
    return state
  grads = scaled(
    state.origin_total, 1.0 / jnp.maximum(state.origin_count_B, 1.0)
  )
  writes_B = jnp.isfinite(norm(grads))
  if due_B is not None:
    writes_B = due_B & writes_B
  grads = where_rows(writes_B, grads, jax.tree.map(jnp.zeros_like, grads))
  plain = UpdateConfig('sgd', clip=cfg.clip)
  step, _ = update.step(plain, None, grads, rate_n)
  step = where_rows(writes_B, step, jax.tree.map(jnp.zeros_like, step))
  origin = jax.tree.map(jnp.add, state.origin, step)
  zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # noqa: E731
  done = state._replace(
    delta=origin,
    kept_B=jnp.ones_like(state.kept_B),
    moment=state.moment and zeros(state.moment),
    origin=origin,
    origin_total=zeros(origin),
    origin_count_B=zeros(state.origin_count_B),
  )
  return done if due_B is None else where_rows(due_B, done, state)


def norm(tree):
  """Frobenius norm of each sequence's part, over blocks and matrices, [B]."""
  return update.root(update.square(tree).sum(0))
