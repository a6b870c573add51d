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

from nestax.optim import (
  arguments,
  matrices,
  moments,
  newton_schulz,
  rms,
  timescales,
)
from nestax.optim import coefficients as coefficients_lib
from nestax.optim.coefficients import MUON, Coefficients
from nestax.optim.timescales import TimeScale

ACCUMULATE = ('ema', 'sum')
# Arguments of `m3` that may be functions or classes and are no schedules.
STATIC = ('weight_decay_mask', 'dimension_numbers', 'dtype', 'slow_dtype')


class M3Error(ValueError):
  """The arguments do not make an M3."""


class M3State(NamedTuple):
  """What M3 carries from step to step; trees are shaped like the parameters."""

  count: jax.Array  # int32, steps done
  fast: optax.Updates  # float32
  slow: tuple[optax.Updates, ...]  # see `timescales`
  directions: tuple[optax.Updates, ...]  # NS(slow) at the last window's end
  second: optax.Updates | None  # float32


class _Rule(NamedTuple):
  """The arguments of `scale_by_m3`."""

  b1: Any
  b2: Any
  slow: tuple[TimeScale, ...]
  accumulate: str
  nesterov: bool
  coefficients: Coefficients
  dimension_numbers: matrices.DimensionNumbers
  consistent_rms: Any
  eps: Any
  dtype: Any
  slow_dtype: Any
  layout: newton_schulz.Layout | None

  @property
  def ema(self) -> bool:
    return self.accumulate == 'ema'


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
    consistent_rms: RMS of the elements of an update; 0.2 is about AdamW's, so
      that its learning rates fit (arXiv 2502.16982, at every width; how far
      that was seen here is in BUILD_NOTES.md). From the shape alone,
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
    M3Error, coefficients.CoefficientError: for arguments out of range; traced
      numbers are taken as they are. From `update`, M3Error for the state of
      another M3.
  """
  rule = _Rule(
    b1,
    b2,
    timescales.read(M3Error, slow, accumulate != 'sum'),
    accumulate,
    nesterov,
    coefficients_lib.read(coefficients),
    dimension_numbers,
    consistent_rms,
    eps,
    dtype,
    slow_dtype,
    layout,
  )
  _check(rule)

  def init_fn(params):
    return _init(rule, params)

  def update_fn(updates, state, params=None):
    del params
    return _update(rule, updates, state)

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
  by `optax.multi_transform` with the labels of `labels.label`.

  Under `optax.inject_hyperparams` numbers become part of the state, and what
  can be called is taken for a schedule; STATIC names the arguments that are
  not one:

    make = optax.inject_hyperparams(m3.m3, static_args=m3.STATIC)
    tx = make(0.02, dimension_numbers=numbers_of)
    state.hyperparams['learning_rate'] = jnp.asarray(0.01)

  Args:
    learning_rate: a number or a schedule.
    b1, b2, slow: see `scale_by_m3`.
    weight_decay: times the learning rate, as in AdamW.
    weight_decay_mask: as in `optax.add_decayed_weights`.
    accumulate, nesterov, coefficients, dimension_numbers, consistent_rms,
      eps, dtype, slow_dtype, layout: see `scale_by_m3`.

  Returns:
    The transformation.

  Raises:
    M3Error, coefficients.CoefficientError: for arguments out of range.
  """
  arguments.rate(M3Error, 'learning_rate', learning_rate)
  arguments.rate(M3Error, 'weight_decay', weight_decay)
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


def _init(rule: _Rule, params) -> M3State:
  matrices.resolve(params, rule.dimension_numbers)

  def zeros(dtype):
    return optax.tree.zeros_like(params, dtype=dtype)

  return M3State(
    count=jnp.zeros((), jnp.int32),
    fast=zeros(jnp.float32),
    slow=tuple(zeros(rule.slow_dtype) for _ in rule.slow),
    directions=tuple(zeros(rule.dtype) for _ in rule.slow),
    second=None if rule.b2 is None else zeros(jnp.float32),
  )


def _update(rule: _Rule, updates, state: M3State):
  def orthogonalize(tree):
    return newton_schulz.orthogonalize_tree(
      tree,
      rule.coefficients,
      rule.dimension_numbers,
      rule.dtype,
      rule.eps,
      rule.layout,
    )

  _check_state(rule, state)
  grads = optax.tree.cast(updates, jnp.float32)
  count = optax.safe_increment(state.count)
  fast = moments.gather(grads, state.fast, rule.b1, 1, rule.ema)
  ahead = fast
  if rule.nesterov:
    ahead = moments.look_ahead(grads, fast, rule.b1, count)
  total = orthogonalize(ahead)
  momenta, directions = [], []
  for scale, momentum, old in zip(rule.slow, state.slow, state.directions):
    # The direction of the windows before this step's.
    total = jax.tree.map(
      lambda t, d, a=scale.alpha: t + a * d.astype(t.dtype), total, old
    )
    momentum = timescales.gather(grads, momentum, scale, count, rule.ema)
    momenta.append(momentum)
    directions.append(
      timescales.refresh(orthogonalize, momentum, old, scale, count)
    )
  second = None
  if rule.b2 is not None:
    second = moments.gather(grads, state.second, rule.b2, 2, rule.ema)
    total = moments.divide(total, second, rule.b2, count, rule.eps, rule.ema)
  total = _to_rms(rule, total)
  total = jax.tree.map(lambda t, u: t.astype(u.dtype), total, updates)
  return total, M3State(count, fast, tuple(momenta), tuple(directions), second)


def _to_rms(rule, total):
  if rule.consistent_rms is None:
    return total
  if rule.b2 is not None:
    return rms.measured(
      total, rule.consistent_rms, rule.dimension_numbers, rule.eps
    )
  share = 1 + sum(scale.alpha for scale in rule.slow)
  return rms.from_shape(
    total, rule.consistent_rms / share, rule.dimension_numbers
  )


def _check_state(rule: _Rule, state: M3State) -> None:
  """Refuses a state with more or fewer moments, such as of another config."""
  kept = len(state.slow), state.second is not None
  wanted = len(rule.slow), rule.b2 is not None
  if kept != wanted:
    words = [
      f'{count} slow momenta and {"a" if second else "no"} second moment'
      for count, second in (kept, wanted)
    ]
    raise M3Error(f'the state has {words[0]}, but this M3 {words[1]}')


def _check(rule: _Rule) -> None:
  arguments.one_of(M3Error, 'accumulate', rule.accumulate, ACCUMULATE)
  if rule.nesterov and not rule.ema:
    raise M3Error(
      "nesterov looks ahead of a decaying mean: with 'sum' it has to be False"
    )
  timescales.factor(M3Error, 'b1', rule.b1, rule.ema)
  if rule.b2 is not None:
    timescales.factor(M3Error, 'b2', rule.b2, rule.ema)
  if rule.consistent_rms is not None:
    arguments.within(
      M3Error, 'consistent_rms', rule.consistent_rms, low_open=True
    )
  arguments.within(M3Error, 'eps', rule.eps, low_open=True)
  arguments.floating(M3Error, 'dtype', rule.dtype)
  arguments.floating(M3Error, 'slow_dtype', rule.slow_dtype)
