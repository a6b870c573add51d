"""M3, multi-scale momentum Muon (NL section 7.2, Algorithm 1 and Eq. 75).

M1 gathers every gradient, slow momenta M2 gather a window of `every` steps,
V the squares; NS is Newton-Schulz:

  O1 = NS(M1)   O2 = NS(M2), once per window, of the windows before
  Theta <- Theta - lr (O1 + alpha O2) / (sqrt(V) + eps)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestax.optim import matrices, newton_schulz, rounding
from nestax.optim.coefficients import MUON, Coefficients

ACCUMULATE = ('ema', 'sum')


class M3Error(ValueError):
  """The arguments do not make an M3."""


class TimeScale(NamedTuple):
  """A slow momentum: decay per window, steps per window, share of update."""

  beta: float = 0.9
  every: int = 10
  alpha: float = 0.5


class M3State(NamedTuple):
  """What M3 carries from step to step; trees are shaped like the parameters.

  Between the ends of two windows `slow` holds the finished windows and what
  the open one has gathered, so that no second accumulator is needed.
  """

  count: jax.Array  # int32, steps done
  fast: optax.Updates  # float32
  slow: tuple[optax.Updates, ...]
  directions: tuple[optax.Updates, ...]  # NS(slow) at the last window's end
  second: optax.Updates | None  # float32


def scale_by_m3(
  b1: float = 0.95,
  b2: float | None = None,
  slow: Sequence[TimeScale] = (TimeScale(),),
  *,
  accumulate: str = 'ema',
  nesterov: bool = False,
  coefficients: Coefficients = MUON,
  dimension_numbers: matrices.DimensionNumbers = None,
  consistent_rms: float | None = None,
  eps: float = 1e-8,
  dtype: jax.typing.DTypeLike = 'bfloat16',
  slow_dtype: jax.typing.DTypeLike = 'float32',
  layout: newton_schulz.Layout | None = None,
) -> optax.GradientTransformation:
  """Replaces gradients of matrices by M3's update.

  Args:
    b1: factor of the fast momentum.
    b2: factor of the second moment V; None leaves V out (divides by 1).
    slow: the slow momenta, the paper's one or any number; none, with `b2`
      None, is Muon.
    accumulate: 'sum' is Algorithm 1 as printed, M1 <- M1 + b1 g,
      V <- V + b2 g^2, M2 <- M2 + beta sum(g of the window); 'ema' decays:
      M1 <- b1 M1 + (1 - b1) g, V likewise with bias correction,
      M2 <- beta M2 + (1 - beta) mean(g of the window).
    nesterov: orthogonalise the momentum one step ahead, as Muon does; with
      'ema' only.
    coefficients: of Newton-Schulz, see `coefficients`.
    dimension_numbers: which axes are matrices, see `matrices`.
    consistent_rms: RMS of the elements of an update, 0.2 to share AdamW's
      learning rates at every width (arXiv 2502.16982). From the shape alone,
      rms * sqrt(max(in, out)) / (1 + sum of alphas), or with V, which changes
      the scale, measured per matrix. None scales by nothing, as printed.
    eps: added to sqrt(V), and to norms before they divide.
    dtype: of Newton-Schulz's matmuls and of the kept O2, 'bfloat16' or
      'float32'.
    slow_dtype: of the slow momenta; 'bfloat16' rounds stochastically.
    layout: of the matrices on a mesh, see `newton_schulz`. Pin the state by
      `out_shardings` then: where a parameter is not sharded over an axis of
      the mesh, the partitioner may else choose to shard its state.

  Returns:
    The transformation. Its state is 10 bytes a parameter with one slow
    momentum (8 with a bfloat16 one), 4 more with V.

  Raises:
    M3Error: for arguments out of range.
  """
  slow = tuple(TimeScale(*scale) for scale in slow)
  _check(slow, accumulate, nesterov)
  ema = accumulate == 'ema'

  def orthogonalize(tree):
    return newton_schulz.orthogonalize_tree(
      tree, coefficients, dimension_numbers, dtype, eps, layout
    )

  def init_fn(params):
    def zeros(dtype):
      return optax.tree.zeros_like(params, dtype=dtype)

    matrices.resolve(params, dimension_numbers)
    return M3State(
      count=jnp.zeros((), jnp.int32),
      fast=zeros(jnp.float32),
      slow=tuple(zeros(slow_dtype) for _ in slow),
      directions=tuple(zeros(dtype) for _ in slow),
      second=None if b2 is None else zeros(jnp.float32),
    )

  def update_fn(updates, state, params=None):
    del params
    grads = optax.tree.cast(updates, jnp.float32)
    count = optax.safe_increment(state.count)
    fast = _gather(grads, state.fast, b1, 1, ema)
    ahead = _look_ahead(grads, fast, b1, count) if nesterov else fast
    total = orthogonalize(ahead)
    for scale, direction in zip(slow, state.directions):
      total = jax.tree.map(
        lambda t, d, a=scale.alpha: t + a * d.astype(t.dtype), total, direction
      )
    momenta, directions = [], []
    for scale, momentum, direction in zip(slow, state.slow, state.directions):
      momentum = _gather_slow(grads, momentum, scale, count, ema)
      momenta.append(momentum)
      directions.append(_refresh(momentum, direction, scale, count))
    second = None
    if b2 is not None:
      second = _gather(grads, state.second, b2, 2, ema)
      total = _divide(total, second, b2, count, eps, ema)
    total = _scale(total, consistent_rms, slow, b2, eps)
    total = jax.tree.map(lambda t, u: t.astype(u.dtype), total, updates)
    return total, M3State(
      count, fast, tuple(momenta), tuple(directions), second
    )

  def _refresh(momentum, direction, scale, count):
    def due(momentum, direction):
      del direction
      # Cast first: the result then needs no more memory than is kept.
      return orthogonalize(optax.tree.cast(momentum, dtype))

    def not_due(momentum, direction):
      del momentum
      return direction

    return jax.lax.cond(
      count % scale.every == 0, due, not_due, momentum, direction
    )

  def _scale(total, rms, slow, b2, eps):
    if rms is None:
      return total
    numbers = matrices.resolve(total, dimension_numbers)

    def by_shape(x, number):
      share = 1 + sum(scale.alpha for scale in slow)
      return x * (rms * jnp.sqrt(max(matrices.sizes(x.shape, number))) / share)

    def measured(x, number):
      axes = matrices.matrix_axes(x.ndim, number)
      size = jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))
      return x * (rms / (size + eps))

    return jax.tree.map(by_shape if b2 is None else measured, total, numbers)

  return optax.GradientTransformation(init_fn, update_fn)


def m3(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.95,
  b2: float | None = None,
  slow: Sequence[TimeScale] = (TimeScale(),),
  weight_decay: float = 0.0,
  weight_decay_mask: Any = None,
  *,
  accumulate: str = 'ema',
  nesterov: bool = False,
  coefficients: Coefficients = MUON,
  dimension_numbers: matrices.DimensionNumbers = None,
  consistent_rms: float | None = 0.2,
  eps: float = 1e-8,
  dtype: jax.typing.DTypeLike = 'bfloat16',
  slow_dtype: jax.typing.DTypeLike = 'float32',
  layout: newton_schulz.Layout | None = None,
) -> optax.GradientTransformation:
  """Makes M3 with decoupled weight decay, for matrices only.

  Parameters that are not matrices belong to another optimiser: join the two
  by `optax.multi_transform` with the labels of `labels.label`. Under
  `optax.inject_hyperparams` name `dimension_numbers` in `static_args` if it
  is a function.

  Args:
    learning_rate: a number or a schedule.
    b1, b2, slow: see `scale_by_m3`.
    weight_decay: times the learning rate, as in AdamW.
    weight_decay_mask: as in `optax.add_decayed_weights`.
    accumulate, nesterov, coefficients, dimension_numbers, consistent_rms,
      eps, dtype, slow_dtype, layout: see `scale_by_m3`.

  Returns:
    The transformation.
  """
  return optax.chain(
    scale_by_m3(
      b1,
      b2,
      slow,
      accumulate=accumulate,
      nesterov=nesterov,
      coefficients=coefficients,
      dimension_numbers=dimension_numbers,
      consistent_rms=consistent_rms,
      eps=eps,
      dtype=dtype,
      slow_dtype=slow_dtype,
      layout=layout,
    ),
    optax.add_decayed_weights(weight_decay, weight_decay_mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _gather(grads, moment, beta, order, ema):
  if ema:
    return optax.tree.update_moment(grads, moment, beta, order)
  return jax.tree.map(lambda g, m: m + beta * g**order, grads, moment)


def _look_ahead(grads, fast, b1, count):
  """Nesterov's momentum with the bias corrections of Dozat and optax."""
  step = count.astype(jnp.float32)
  now = optax.tree.bias_correction(grads, b1, step)
  then = optax.tree.bias_correction(fast, b1, step + 1)
  return jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, then, now)


def _gather_slow(grads, momentum, scale, count, ema):
  """Adds a gradient; decays once a window, at its first step."""
  decay, share = 1.0, scale.beta
  if ema:
    first = (count - 1) % scale.every == 0
    decay = jnp.where(first, scale.beta, 1.0).astype(jnp.float32)
    share = (1 - scale.beta) / scale.every

  def gather(g, m):
    total = decay * m.astype(jnp.float32) + share * g
    if m.dtype == jnp.bfloat16:
      return rounding.to_bfloat16(total, count)
    return total.astype(m.dtype)

  return jax.tree.map(gather, grads, momentum)


def _divide(total, second, b2, count, eps, ema):
  if ema:
    step = count.astype(jnp.float32)
    second = optax.tree.bias_correction(second, b2, step)
  return jax.tree.map(lambda t, v: t / (jnp.sqrt(v) + eps), total, second)


def _check(slow, accumulate, nesterov):
  if accumulate not in ACCUMULATE:
    raise M3Error(
      f'accumulate is {accumulate!r}: it has to be one of '
      + ', '.join(ACCUMULATE)
    )
  if nesterov and accumulate == 'sum':
    raise M3Error("nesterov looks ahead of a decaying mean: not with 'sum'")
  for scale in slow:
    if not isinstance(scale.every, int) or scale.every < 1:
      raise M3Error(
        f'a slow momentum is refreshed every {scale.every!r} steps: it has '
        'to be a whole number, 1 or above'
      )
