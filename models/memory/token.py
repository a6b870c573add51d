"""One token at a time: the definition of right for the memory recurrence.

NL Eq. 83-93 with the choices of the design: for every memory, with the
boundary weights `M'` (those at the start of the chunk),

  k, v, eta, alpha = M'_box(x)      vhat_box = v + M'_box(v)
  e = M'_box(k) - vhat_box
  S = beta S - eta e k^T            D = D (alpha I - eta k k^T) + S

A two-layer memory `W1 gelu(W2 z)` follows the rule layer by layer: W2 with key
k and error `g = gelu'(W2 k) * (W1^T e)`, W1 with key `h / ||h||`, `h = gelu(W2
k)`, and error e. Unless `bounded=False` these errors are divided by `max(1,
||g||^2 / ||e||^2)` and `max(1, ||h||)`, through which gradients flow too.

Nothing here is fast; `chunk.py` is held to it by the tests.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.models.memory.types import (
  MemoryConfig,
  MemoryState,
  Weights,
  inner_gain,
  outer_gain,
  stack_initial,
  unit,
)


class Token(NamedTuple):
  """One token of one head: `[K]` three times, then scalars or None."""

  query: jax.Array
  key: jax.Array
  value: jax.Array
  log_beta: jax.Array | None
  reset: jax.Array | None
  eta: jax.Array | None
  log_alpha: jax.Array | None


def _pick(cfg: MemoryConfig, box: str, weights: Weights):
  """The rows of one memory on the stack, and its second layer or None."""
  start, stop = cfg.rows(weights.stack.shape[-1])[box]
  return weights.stack[start:stop], weights.outer.get(box)


def _map(cfg, box, weights, z):
  """A memory without its residual: `W z`, or `W1 gelu(W2 z)`."""
  inner, outer = _pick(cfg, box, weights)
  return inner @ z if outer is None else outer @ jax.nn.gelu(inner @ z)


def _read(cfg, box, weights, z):
  """`M(z)`: a memory with its residual, where it has one."""
  return _map(cfg, box, weights, z) + (z if box in cfg.identity else 0)


def _project(cfg, initial, boundary: Weights, token: Token):
  """q, k, v, eta and alpha, each read from its memory if it has one."""

  def box(name, x):
    return _read(cfg, name, boundary, x) if name in cfg.boxes else x

  def gate(name):
    if name in cfg.gates:
      logit = (_pick(cfg, name, boundary)[0] @ token.key)[0]
    else:
      logit = initial[name]['kernel'] @ token.key
    return logit + initial[name]['bias']

  q, k, v = box('q', token.query), box('k', token.key), box('v', token.value)
  q, k = (unit(q), unit(k)) if cfg.key_norm else (q, k)
  v = unit(v) if cfg.value_norm else v
  if 'eta' in cfg.given:
    eta = token.eta
  else:
    eta = cfg.eta_max * jax.nn.sigmoid(gate('eta'))
  if not cfg.retention:
    alpha = 1.0
  elif 'alpha' in cfg.given:
    alpha = jnp.exp(token.log_alpha)
  else:
    alpha = jax.nn.sigmoid(gate('alpha'))
  return q, k, v, eta, alpha


def _errors(cfg, boundary, k, v):
  """Per memory, (gradient at the first layer, key and gradient at the second).

  `e = M'(k) - vhat` for the L2 objective, `-vhat` for the dot product; a gate
  has neither residual nor outer value: its `vhat` is `m(v)`.
  """
  l2 = cfg.objective == 'l2'
  errors = {}
  for gate in cfg.gates:
    row = _pick(cfg, gate, boundary)[0]
    errors[gate] = ((row @ k if l2 else 0.0) - row @ v, None, None)
  for box in cfg.boxes:
    e = _read(cfg, box, boundary, k) if l2 else 0.0
    e = e - v - (_map(cfg, box, boundary, v) if cfg.generated else 0.0)
    inner, outer = _pick(cfg, box, boundary)
    if outer is None:
      errors[box] = (e, None, None)
    else:
      h, back = jax.vjp(jax.nn.gelu, inner @ k)
      (below,) = back(outer.T @ e)
      above = e
      if cfg.bounded:
        above, below = e / outer_gain(h), below / inner_gain(e, below)
      errors[box] = (below, unit(h), above)
  return errors


def _write(cfg, anchor, D, S, k, e, eta, alpha, beta):
  """The update of one matrix: (fast part, momentum)."""
  gradient = eta * jnp.outer(e, k)
  S = beta * S - gradient if cfg.momentum else -gradient
  kept = D + anchor
  decayed = alpha * kept
  if cfg.delta:
    decayed = decayed - eta * jnp.outer(kept @ k, k)
  return decayed - anchor + S, S


def step(cfg: MemoryConfig, initial, state: MemoryState, token: Token):
  """Advances one head of one sequence by one token.

  Args:
    cfg: the rule.
    initial: the head's slow initial values (see `types.stack_initial`).
    state: unbatched, `stack [R, K]`, `position_B` a scalar.
    token: its inputs.

  Returns:
    (state, output [K]), float32.
  """
  slow = stack_initial(cfg, initial)
  fast = (state.boundary, state.running, state.momentum)
  if token.reset is not None:
    fast = jax.tree.map(lambda w: jnp.where(token.reset, 0.0, w), fast)
  boundary, running, momentum = fast
  momentum = momentum or jax.tree.map(jnp.zeros_like, running)
  at_boundary = jax.tree.map(jnp.add, slow, boundary)

  q, k, v, eta, alpha = _project(cfg, initial, at_boundary, token)
  beta = jnp.exp(token.log_beta) if cfg.momentum else 0.0
  errors = _errors(cfg, at_boundary, k, v)
  e = jnp.concatenate([errors[b][0] for b in (*cfg.boxes, *cfg.gates)])
  anchors = slow if cfg.anchor == 'zero' else jax.tree.map(jnp.zeros_like, slow)

  write = partial(_write, cfg, eta=eta, alpha=alpha, beta=beta)
  stack, s_stack = write(anchors.stack, running.stack, momentum.stack, k=k, e=e)
  outer, s_outer = {}, {}
  for box in cfg.deep:
    outer[box], s_outer[box] = write(
      anchors.outer[box],
      running.outer[box],
      momentum.outer[box],
      k=errors[box][1],
      e=errors[box][2],
    )
  running = Weights(stack, outer)
  momentum = Weights(s_stack, s_outer) if cfg.momentum else None

  now = jax.tree.map(jnp.add, slow, running)
  output = _read(cfg, 'mem', now if cfg.read == 'token' else at_boundary, q)
  position = state.position_B + 1
  boundary = commit(cfg, boundary, running, position)
  position = position % cfg.chunks[1]
  return MemoryState(boundary, running, momentum, position), output


def commit(cfg: MemoryConfig, boundary: Weights, running: Weights, position):
  """Moves the boundary to the running weights where a chunk ends here."""
  ends = {
    box: position % (cfg.chunk_mem if box == 'mem' else cfg.chunk_rest) == 0
    for box in (*cfg.boxes, *cfg.gates)
  }
  K = running.stack.shape[-1]
  rows = cfg.rows(K)
  due = jnp.concatenate(
    [
      jnp.broadcast_to(ends[box], (stop - start, 1))
      for box, (start, stop) in rows.items()
    ]
  )
  stack = jnp.where(due, running.stack, boundary.stack)
  outer = {
    box: jnp.where(ends[box], running.outer[box], boundary.outer[box])
    for box in cfg.deep
  }
  return Weights(stack, outer)


def run(cfg: MemoryConfig, initial, state: MemoryState, tokens: Token):
  """Scans `step` over `[L, ...]` inputs of one head of one sequence."""

  def body(state, token):
    # accelerators would otherwise round the operands of float32 products
    with jax.default_matmul_precision('highest'):
      return step(cfg, initial, state, token)

  return jax.lax.scan(body, state, tokens)
