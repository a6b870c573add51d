"""A change of a large state that is seldom due, made in place."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def once(due, change: Callable, state):
  """`change(state)` where `due`, else `state`, as `lax.cond` gives it.

  Both branches of a condition are given room of their own for what comes out,
  so that a state which does not change is copied, every time. A loop of at
  most one round writes into its own; its derivatives are the condition's.

  Args:
    due: a bool scalar.
    change: from a state to one of the same shapes.
    state: arrays.
  """
  pure, used = jax.closure_convert(change, state)

  @jax.custom_jvp
  def loop(due, state, used):
    def body(carry):
      return jnp.zeros_like(due), pure(carry[1], *used)

    return jax.lax.while_loop(lambda carry: carry[0], body, (due, state))[1]

  @loop.defjvp
  def derivative(primals, tangents):
    def condition(due, state, used):
      return jax.lax.cond(due, lambda s: pure(s, *used), lambda s: s, state)

    return jax.jvp(condition, primals, tangents)

  return loop(due, state, used)
