"""The chunk on tiles against `chunk_step` and its automatic derivatives."""

import jax
import jax.numpy as jnp
import memory_cases as cases
import pytest

from nestax.models.memory import tile, tile_backward, tile_front
from nestax.models.memory.chunk import chunk_step
from nestax.models.memory.decay import Chunk
from nestax.models.memory.tpu_layout import as_rows, lay, unlay
from nestax.models.memory.tpu_layout import marks as laid_marks
from nestax.models.memory.types import (
  GATES,
  MemoryConfig,
  Weights,
  stack_initial,
)

C, K = 16, cases.K
RULES = {
  'default': {},
  'boundary_read': {'read': 'boundary'},
  'dot': {'objective': 'dot', 'identity': ('k', 'mem')},
  'one_slow_gate': {'adaptive': ('v', 'alpha')},
  'adaptive_q': {'adaptive': ('q', 'k', 'v', 'eta', 'alpha')},
  'mem_alone': {
    'adaptive': (),
    'identity': (),
    'generated': False,
    'delta': False,
  },
  'mem_alone_dot': {'adaptive': (), 'generated': False, 'objective': 'dot'},
  'titans': {'adaptive': (), 'generated': False, 'delta': False},
  'no_retention': {'retention': False, 'value_norm': False},
}
# What they try, the others try too, beside something else.
SLOW = 'mem_alone_dot', 'titans'


def head(cfg, resets):
  """One head's initial values, state and chunk, all float64."""
  initial = cases.initial_values(cfg, jnp.float64)
  initial = jax.tree.map(lambda x: x[0], initial)
  R = max(stop for _, stop in cfg.rows(K).values())
  keys = jax.random.split(jax.random.key(3), 5)
  state = tuple(0.3 * jax.random.normal(key, (R, K)) for key in keys[:2])
  streams = tuple(jax.random.normal(key, (C, K)) for key in keys[2:])
  reset = jnp.zeros((C,), bool).at[jnp.array([5, 11])].set(True)
  live = jnp.arange(C) < 13
  return initial, state, streams, (reset, live) if resets else (None, None)


def by_chunk_step(cfg, marks, together):
  """(boundary, running, output), as a function of all that is real."""

  def run(initial, state, streams):
    boundary, running = (state[1], state[1]) if together else state
    (boundary, running, _), out = chunk_step(
      cfg,
      initial,
      stack_initial(cfg, initial),
      (Weights(boundary, {}), Weights(running, {}), None),
      Chunk(*streams, None, *marks),
      jnp.float64,
    )
    return (0.0 if together else boundary.stack), running.stack, out

  return run


def by_tiles(cfg, marks, together, given, gradients):
  """The same and its gradients, from the tiles."""
  initial, state, streams = given
  slow = lay(cfg, stack_initial(cfg, initial).stack, K)
  slow = slow._replace(
    gates_8xK=as_rows([initial[gate]['kernel'] for gate in GATES])
  )
  bias = as_rows([initial[gate]['bias'][None] for gate in GATES])
  boundary, running = (lay(cfg, x, K) for x in state)
  fast = tile_front.State(None if together else boundary, running, None)
  rows = laid_marks(*(None if m is None else m[None, None] for m in marks))
  tokens = tile_front.Tokens(*streams, None if rows is None else rows[0, 0])
  end, out, saved = tile.forward(cfg, slow, bias, fast, tokens, jnp.float64)
  d_end = tile_front.State(
    None if together else lay(cfg, gradients[0], K),
    lay(cfg, gradients[1], K),
    None,
  )
  d_before, d_slow, d_logit, d_tokens = tile_backward.backward(
    cfg, slow, bias, saved, tokens, d_end, gradients[2], jnp.float64
  )
  d_initial = {
    box: {'kernel': d_slow.maps_KxM[:, i * K : (i + 1) * K].T}
    for i, box in enumerate(cfg.boxes)
  } | {
    gate: {'kernel': d_slow.gates_8xK[i], 'bias': d_logit[i].sum()}
    for i, gate in enumerate(GATES)
  }
  d_boundary, d_running, _ = d_before
  zero = jnp.zeros_like(state[0])
  d_boundary = zero if together else unlay(cfg, d_boundary)
  end_boundary = 0.0 if together else unlay(cfg, end.boundary)
  values = (end_boundary, unlay(cfg, end.running), out)
  return values, (d_initial, (d_boundary, unlay(cfg, d_running)), d_tokens)


# what the rules differ in does not ask where the boundary is
@pytest.mark.parametrize(
  'name,resets,together',
  [
    *((name, True, False) for name in RULES if name not in SLOW),
    *(
      pytest.param(*(name, True, False), marks=pytest.mark.slow)
      for name in SLOW
    ),
    *(
      pytest.param(
        *(name, False, True),
        marks=() if name == 'default' else pytest.mark.slow,
      )
      for name in RULES
    ),
  ],
)
def test_tiles_equal_chunk_step_in_value_and_gradient(name, resets, together):
  cfg = MemoryConfig(chunk_mem=C, chunk_rest=C, **RULES[name])
  with jax.enable_x64(True):
    *given, marks = head(cfg, resets)

    @jax.jit
    def want(given):
      run = by_chunk_step(cfg, marks, together)
      values, back = jax.vjp(run, *given)
      gradients = jax.tree.map(lambda x: jnp.cos(3 * x), values)
      return values, back(gradients), gradients

    values, derivatives, gradients = want(tuple(given))
    got = jax.jit(lambda *args: by_tiles(cfg, marks, together, *args))
    got = got(tuple(given), gradients)
    cases.assert_close(got, (values, derivatives), 1e-11)
