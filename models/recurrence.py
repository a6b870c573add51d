"""The memory's recurrence on the mesh in force: walks apart, devices apart.

A walk is one head of one sequence and needs nothing of the others, so sequences
lie over the axes of the batch and heads over those of the heads. Where lengths
are split too (`sequence`), a device hands its tokens of all heads on and takes
all tokens of a few: heads over one more axis, tokens over one less, an
all-to-all before the walk and one after it. Heads that the axes do not divide
are walked by several devices alike.
"""

import jax
import jax.numpy as jnp

from nestax.models import axes
from nestax.models.memory import api
from nestax.models.memory.types import Inputs, MemoryConfig, MemoryState

STREAM = ('batch', None, 'walks', None)
FAST = ('batch', 'walks', 'memory', 'memory')
STATE = MemoryState(FAST, FAST, FAST, ('batch',))


def run(
  cfg: MemoryConfig,
  initial,
  state,
  inputs: Inputs,
  *,
  dtype=jnp.float32,
  implementation: str | None = None,
  length_B=None,
  aligned: bool = False,
):
  """`memory.api.run`, every device its own sequences and heads."""

  def walk(initial, state, inputs, length_B):
    return api.run(
      cfg,
      initial,
      state,
      inputs,
      dtype=dtype,
      implementation=implementation,
      length_B=length_B,
      aligned=aligned,
    )

  B, _, H, _ = inputs.query.shape
  if (same := axes.repeats('walks', H)) > 1:
    api.say_once(
      f'H={H} heads: {same} devices of the mesh do each of them alike'
    )
  kept = None if state is None else STATE
  ours = axes.by_shard(
    walk,
    {'batch': B, 'walks': H},
    (
      ('walks',),
      kept,
      jax.tree.map(lambda x: STREAM[: x.ndim], inputs),
      None if length_B is None else ('batch',),
    ),
    (kept, STREAM),
  )
  return ours(initial, state, inputs, length_B)
