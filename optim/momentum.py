"""Momentum as an associative memory of gradients (NL section 4.2-4.4).

Kernels are `[in, out]` here, the transpose of NL's W, so what NL multiplies
from the right acts from the left; momenta gather +g, and the sign comes with
the learning rate. With k = g / |g|:

  dot (Eq. 46-47)  m <- alpha m + eta P phi(g)
  l2 (Eq. 48-49)   m <- (alpha I - k k^T) m + eta P phi(g)
  deep (Eq. 50)    m <- m_0 + alpha (m - m_0) - eta grad L(m; k), m an MLP

and the update is sigma(m) or sigma(m(k)) (Eq. 51-52).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestax.optim import arguments, matrices, norms

OBJECTIVES = ('l2', 'dot')
# Arguments that `optax.inject_hyperparams` shall leave as they are
# (`static_args`): functions that are no schedules, and sizes.
DELTA_STATIC = ('features', 'output', 'dimension_numbers')
DEEP_STATIC = (
  'hidden',
  'objective',
  'activation',
  'output',
  'dimension_numbers',
  'seed',
)
_TINY = 1e-30  # keeps zero gradients zero
Stack = Callable[[jax.Array], jax.Array]  # [batch, in, out] -> the same


class MomentumError(ValueError):
  """The arguments do not make a momentum."""


class DeltaMomentumState(NamedTuple):
  """The memory, shaped like the parameters in float32, and P's state."""

  memory: optax.Updates
  precondition: Any


class DeepMomentumState(NamedTuple):
  """Per parameter a two-layer memory of its gradient's rows, in float32."""

  initial: Any  # first layer as born, [batch, out, hidden]
  first: Any  # what was written on it
  second: Any  # [batch, hidden, out], born zero


def scale_by_delta_momentum(
  alpha: float = 0.9,
  eta: float = 1.0,
  *,
  objective: str = 'l2',
  normalize: bool = True,
  precondition: optax.GradientTransformation | None = None,
  features: Stack | None = None,
  output: Stack | None = None,
  dimension_numbers: matrices.DimensionNumbers = None,
) -> optax.GradientTransformation:
  """Replaces gradients by a linear memory of them.

  Along directions that come again the delta rule writes anew what it finds
  there, instead of piling up; others keep theirs. 'dot' without options is
  heavy-ball momentum, and with Newton-Schulz for `output` Muon (Eq. 52). Under
  `optax.inject_hyperparams` give `static_args=momentum.DELTA_STATIC`.

  Args:
    alpha: retention of the memory, from 0 to 1.
    eta: how much of a gradient is written, 0 or above.
    objective: 'l2' or 'dot', see the module.
    normalize: divides the key, not what is written, by its Frobenius norm:
      all directions then keep between alpha - 1 and alpha of theirs. False is
      Eq. 49 as printed, unstable for gradients longer than sqrt(1 + alpha).
    precondition: P, any transformation; None for the identity.
    features: phi of Eq. 51, on stacks `[batch, in, out]`.
    output: sigma of Eq. 52, likewise.
    dimension_numbers: which axes are matrices, see `matrices`.

  Raises:
    MomentumError: for numbers out of range or another objective; traced
      numbers are taken as they are.
  """
  _check(alpha, eta)
  arguments.one_of(MomentumError, 'objective', objective, OBJECTIVES)
  precondition = precondition or optax.identity()

  def init_fn(params):
    matrices.resolve(params, dimension_numbers)
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    return DeltaMomentumState(zeros, precondition.init(params))

  def write(g, value, m):
    if objective == 'l2':
      key = norms.unit(g, _TINY) if normalize else g
      forgotten = key @ (key.mT @ m)
    else:
      forgotten = 0.0
    value = features(value) if features else value
    return alpha * m - forgotten + eta * value

  def update_fn(updates, state, params=None):
    numbers = matrices.resolve(updates, dimension_numbers)
    values, inner = precondition.update(updates, state.precondition, params)

    def on_stack(g, value, m, number):
      stacks = [_stack(x, number) for x in (g, value, m)]
      return matrices.from_stack(write(*stacks), g.shape, number)

    memory = jax.tree.map(on_stack, updates, values, state.memory, numbers)

    def read(m, g, number):
      if output is not None:
        m = output(_stack(m, number))
        m = matrices.from_stack(m, g.shape, number)
      return m.astype(g.dtype)

    out = jax.tree.map(read, memory, updates, numbers)
    return out, DeltaMomentumState(memory, inner)

  return optax.GradientTransformation(init_fn, update_fn)


def l2(prediction: jax.Array, value: jax.Array) -> jax.Array:
  """Half the squared distance: the delta rule."""
  return 0.5 * jnp.sum((prediction - value) ** 2)


def dot(prediction: jax.Array, value: jax.Array) -> jax.Array:
  """Minus the inner product: plain Hebbian writing."""
  return -jnp.sum(prediction * value)


def scale_by_deep_momentum(
  hidden: int = 32,
  alpha: float = 0.9,
  eta: float = 0.5,
  *,
  objective: Callable[[jax.Array, jax.Array], jax.Array] = l2,
  activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
  output: Stack | None = None,
  dimension_numbers: matrices.DimensionNumbers = None,
  seed: int = 0,
) -> optax.GradientTransformation:
  """Replaces gradients by what an MLP, trained on them, makes of them.

  NL leaves open what L compares and on what m acts. Here the rows of a
  gradient `[in, out]`, scaled to a mean squared norm of 1, are keys and their
  own values, m(k) = W_2^T act(W_1^T k); W_1 starts random, W_2 at zero, and
  one step is taken on the mean over rows before m is read. Retention acts
  on what was written: as printed, alpha m, both layers would decay to zero
  together, where no gradient brings them back. Under
  `optax.inject_hyperparams` give `static_args=momentum.DEEP_STATIC`.

  Args:
    hidden: width of the memory.
    alpha: retention, from 0 to 1.
    eta: inner learning rate, 0 or above.
    objective: of one row's prediction and value; `l2`, `dot`, or NL's example
      `lambda y, v: -jnp.sum(y)`.
    activation: between the layers.
    output: sigma of Eq. 52 on `[batch, in, out]`.
    dimension_numbers: which axes are matrices, see `matrices`.
    seed: of W_1.

  Raises:
    MomentumError: for numbers out of range; traced ones are taken as they are.
  """
  arguments.whole(MomentumError, 'hidden', hidden)
  arguments.whole(MomentumError, 'seed', seed, 0)
  _check(alpha, eta)
  write = _writer(alpha, eta, objective, activation)

  def init_fn(params):
    numbers = matrices.resolve(params, dimension_numbers)
    return _born(params, numbers, hidden, seed)

  def update_fn(updates, state, params=None):
    del params
    numbers = matrices.resolve(updates, dimension_numbers)

    def one(g, initial, first, second, number):
      out, first, second = write(_stack(g, number), initial, first, second)
      out = output(out) if output else out
      out = matrices.from_stack(out, g.shape, number).astype(g.dtype)
      return out, first, second

    results = jax.tree.map(
      one, updates, state.initial, state.first, state.second, numbers
    )
    out, first, second = (
      jax.tree.map(lambda _, r, i=i: r[i], updates, results) for i in range(3)
    )
    return out, DeepMomentumState(state.initial, first, second)

  return optax.GradientTransformation(init_fn, update_fn)


def _born(params, numbers, hidden, seed):
  leaves, treedef = jax.tree.flatten(params)
  keys = treedef.unflatten(jax.random.split(jax.random.key(seed), len(leaves)))

  def one(x, number, key):
    batch, _, out = matrices.to_stack(x, number).shape
    normal = jax.random.normal(key, (batch, out, hidden), jnp.float32)
    return normal / max(out, 1) ** 0.5

  initial = jax.tree.map(one, params, numbers, keys)
  second = jax.tree.map(lambda x: jnp.zeros_like(x.mT), initial)
  return DeepMomentumState(initial, optax.tree.zeros_like(initial), second)


def _writer(alpha, eta, objective, activation):
  """Makes the step on a stack of memories, and the reading after it."""

  def recall(first, second, keys):
    return activation(keys @ first) @ second

  def loss(layers, initial, keys):
    first, second = layers
    predictions = recall(initial + first, second, keys)
    losses = jax.vmap(jax.vmap(objective))(predictions, keys)
    return jnp.sum(losses) / max(keys.shape[1], 1)

  def write(stack, initial, first, second):
    rows = max(stack.shape[1], 1) ** 0.5
    keys = norms.unit(stack, _TINY) * rows
    norm = norms.frobenius(stack) / rows
    grads = jax.grad(loss)((first, second), initial, keys)
    first = alpha * first - eta * grads[0]
    second = alpha * second - eta * grads[1]
    return norm * recall(initial + first, second, keys), first, second

  return write


def _stack(x, number):
  return matrices.to_stack(x.astype(jnp.float32), number)


def _check(alpha, eta):
  arguments.within(MomentumError, 'alpha', alpha, 0, 1, high_open=False)
  arguments.within(MomentumError, 'eta', eta)
