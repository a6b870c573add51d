"""Kernels where they are differentiated twice, the second time by the scan.

Levels that are differentiated in full need the derivative of a gradient.
Kernels give a value and its gradient; the derivative of that gradient is the
one of `scan.run`'s, the definition that the kernels are held to.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nestax.models.memory import scan
from nestax.models.memory.types import Inputs, MemoryConfig, MemoryState

FEW = 4  # chunks up to which they are walked without a loop


def run(
  kernels: Callable,
  cfg: MemoryConfig,
  initial,
  state: MemoryState | None,
  inputs: Inputs,
  dtype,
  length_B=None,
  aligned: bool = False,
):
  """`kernels`, which `scan.run` describes, with a second derivative."""
  leaves, tree = jax.tree.flatten((initial, state, inputs, length_B))
  moves = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

  def by(how):
    def read(floats, others):
      floats, others = iter(floats), iter(others)
      parts = [next(floats if move else others) for move in moves]
      *args, length_B = jax.tree.unflatten(tree, parts)
      state, out = how(cfg, *args, dtype, length_B, aligned)
      return state and state[:3], out

    return read

  floats = [x for x, move in zip(leaves, moves) if move]
  others = [x for x, move in zip(leaves, moves) if not move]
  slow = functools.partial(scan.run, walk=_walk)
  end, out = twice(by(kernels), by(slow))(floats, others)
  if state is None:
    return None, out
  count = inputs.query.shape[1] if length_B is None else length_B
  position_B = (state.position_B + count) % cfg.chunks[1]
  return MemoryState(*end, position_B), out


def _walk(cfg, initial, slow, carry, xs, ends_nxB, dtype):
  """`scan.walk_chunks`, of few chunks one by one with all they compute.

  A loop would stack it, or compute it again, in kernels that are far too small
  for that.
  """
  n, out = ends_nxB.shape[0], []
  if n > FEW:
    return scan.walk_chunks(cfg, initial, slow, carry, xs, ends_nxB, dtype)
  cfg = dataclasses.replace(cfg, remat=False)
  for i in range(n):
    part = jax.tree.map(lambda x, i=i: x[i : i + 1], (xs, ends_nxB))
    carry, one = scan.walk_chunks(cfg, initial, slow, carry, *part, dtype)
    out.append(one)
  return carry, jnp.concatenate(out)


def twice(fast: Callable, slow: Callable) -> Callable:
  """`fast`, whose gradient is differentiated as `slow`'s.

  Args:
    fast: `(floats, others) -> floats`, differentiable by `floats` once.
    slow: the same function, differentiable twice.
  """

  @jax.custom_vjp
  def gradient(floats, others, d_out):
    _, back = jax.vjp(lambda floats: fast(floats, others), floats)
    return back(d_out)[0]

  def keep(floats, others, d_out):
    return gradient(floats, others, d_out), (floats, others, d_out)

  def second(kept, d_gradient):
    # Of one number, the outputs times `d_out`, the second derivative is
    # symmetric: what comes back along a direction is how the gradient changes
    # in that direction, which stores nothing on the way.
    floats, others, d_out = kept

    def both(floats):
      out, back = jax.vjp(lambda floats: slow(floats, others), floats)
      return out, back(d_out)[0]

    _, (dd_out, d_floats) = jax.jvp(both, (floats,), (d_gradient,))
    return d_floats, None, dd_out

  gradient.defvjp(keep, second)

  @jax.custom_vjp
  def value(floats, others):
    return fast(floats, others)

  # by `value` again, which an outer derivative meets
  value.defvjp(
    lambda floats, others: (value(floats, others), (floats, others)),
    lambda kept, d_out: (gradient(*kept, d_out), None),
  )
  return value
