"""Delta gradient descent for linear layers (NL section 4.5, Eq. 56-57).

NL minimises 1/2 |W x - u|^2 + 1/(2 eta) |W' - W|^2 with u = -dL/dy. Solved
exactly for a batch, with kernels W [in, out], inputs X [B, in] and the
gradient g = X^T dL/dy of the mean loss:

  W' = (I + eta/B X^T X)^-1 (W - eta g)

which for one input is Eq. 57 with eta' = eta / (1 + eta |x|^2) on both terms:
NL's own eta / (1 + eta) is the case |x| = 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nestax.optim import arguments, labels


class DgdError(ValueError):
  """The rate is none, or the inputs given do not belong to the parameters."""


def step(
  kernel: jax.Array,
  x: jax.Array,
  grad_y: jax.Array,
  eta: jax.typing.ArrayLike,
) -> jax.Array:
  """Takes Eq. 57 for one sample, with the exact eta'.

  Args:
    kernel: `[in, out]`, y = x W.
    x: `[in]`.
    grad_y: `[out]`, gradient of the loss in y.
    eta: learning rate.

  Returns:
    The new kernel: W - eta' x (x W + grad_y).
  """
  rate = eta / (1 + eta * jnp.sum(x * x))
  return kernel - rate * jnp.outer(x, x @ kernel + grad_y)


def proximal(
  kernel: jax.Array,
  grad: jax.Array,
  inputs_BxI: jax.Array,
  eta: jax.typing.ArrayLike,
) -> jax.Array:
  """Takes the exact step for a batch, by a solve in the smaller of B and in.

  Args:
    kernel: `[in, out]`.
    grad: its gradient, of the loss's mean over the batch.
    inputs_BxI: what came into the layer, float32.
    eta: learning rate.

  Returns:
    The new kernel.
  """
  moved = kernel - eta * grad
  batch, width = inputs_BxI.shape
  x = inputs_BxI * jnp.sqrt(eta / batch)
  if width <= batch:
    system = jnp.eye(width, dtype=x.dtype) + x.T @ x
    return jax.scipy.linalg.solve(system, moved, assume_a='pos')
  system = jnp.eye(batch, dtype=x.dtype) + x @ x.T
  recalled = jax.scipy.linalg.solve(system, x @ moved, assume_a='pos')
  return moved - x.T @ recalled


def dgd(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """Makes delta gradient descent, told each layer's inputs at every update.

  `tx.update(grads, state, params, inputs=...)`: `inputs` is a tree like the
  parameters with `[B, in]` for kernels `[in, out]` of linear layers and None
  elsewhere; parameters without inputs take a plain gradient step, but no
  inputs at all are refused. The inputs tree may hold more than a masked
  transformation sees. Gradients gathered over several steps do not belong to
  the last one's inputs: `at_frequency` refuses them, `optax.MultiSteps` would
  go wrong in silence.

  Args:
    learning_rate: a number, 0 or above, or a schedule; it acts inside the
      step, so nothing may scale the updates afterwards.

  Returns:
    The transformation; update raises DgdError where shapes do not fit.

  Raises:
    DgdError: for a rate out of range.
  """
  arguments.rate(DgdError, 'learning_rate', learning_rate)

  def init_fn(params):
    del params
    return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

  def update_fn(updates, state, params=None, *, inputs: Any = None):
    if params is None:
      raise DgdError('delta gradient descent needs the parameters in update')
    if inputs is None:
      raise DgdError(
        'delta gradient descent needs `inputs` in update, what came into each '
        'layer; an empty dict for plain gradient steps'
      )
    eta = learning_rate
    if callable(learning_rate):
      eta = learning_rate(state.count)
    leaves, _ = jax.tree_util.tree_flatten_with_path(inputs)
    known = {labels.path_of(keys): x for keys, x in leaves}

    def one(keys, g, kernel):
      path = labels.path_of(keys)
      if path not in known:
        return (-eta * g).astype(g.dtype)
      _check(path, known[path], kernel)
      x, w, grad = (a.astype(jnp.float32) for a in (known[path], kernel, g))
      return (proximal(w, grad, x, eta) - w).astype(g.dtype)

    out = jax.tree_util.tree_map_with_path(one, updates, params)
    count = optax.safe_increment(state.count)
    return out, optax.ScaleByScheduleState(count)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check(path, x, kernel):
  fits = kernel.ndim == x.ndim == 2 and x.shape[1] == kernel.shape[0]
  if not fits or not x.shape[0]:
    raise DgdError(
      f'{path} has the shape {kernel.shape} and inputs {x.shape}: the kernel '
      'has to be [in, out] and its inputs [B, in], B 1 or more'
    )
