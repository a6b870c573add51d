"""The backward pass of `tile_deep`: its derivative, taken in the kernel."""

import jax
import jax.numpy as jnp

from nestax.models.memory.steps import in_turn
from nestax.models.memory.tile_deep import apart, chunk_steps, together
from nestax.models.memory.tile_front import State, Tokens
from nestax.models.memory.types import MemoryConfig, wide


def backward(cfg: MemoryConfig, heads, dtype):
  """Gradients of one chunk of some heads, see `tile_backward.backward_steps`.

  Args:
    cfg: the rule.
    heads: of each, (slow, bias, Saved, tokens, State's gradient, output's).
    dtype: of the matmuls' operands.

  Returns:
    Of each head what `tile_backward.backward_steps` returns.
  """

  def all_apart(state):
    return State(*(apart(cfg, maps) for maps in state))

  given, fixed, gradients = [], [], []
  for slow, bias_8x1, saved, tokens, d_state, d_out in heads:
    size = bias_8x1.shape[0], tokens.key_CxK.shape[0]
    bias_8xC = jnp.broadcast_to(bias_8x1, size)
    # what a token gets is summed in float32
    state, *q_k_v = jax.tree.map(wide, (saved.state, *tokens[:3]))
    streams = *q_k_v, tokens.handed_RxC
    given.append((apart(cfg, slow), bias_8xC, all_apart(state), streams))
    fixed.append((tokens.marks_2xC, saved.inverses))
    gradients.append((all_apart(d_state), d_out))

  def walk(given):
    steps = [
      chunk_steps(
        cfg, slow, bias, state, Tokens(*q_k_v, marks, handed), inverses, dtype
      )
      for (slow, bias, state, (*q_k_v, handed)), (marks, inverses) in zip(
        given, fixed
      )
    ]
    return [after for after, _ in in_turn(steps)]

  _, back = jax.vjp(walk, given)
  (found,) = back(gradients)
  results = []
  for d_slow, d_logit, d_state, (*d_q_k_v, d_handed) in found:
    d_state = State(*(together(cfg, x) for x in d_state))
    d_tokens = Tokens(*d_q_k_v, None, d_handed)
    results.append((d_state, together(cfg, d_slow), d_logit, d_tokens))
  return results
