"""The chunk on tiles against `chunk_step` and its automatic derivatives."""

import jax
import jax.numpy as jnp
import memory_cases as cases
import pytest

from nestax.models.memory import (
  steps,
  tile,
  tile_backward,
  tile_front,
  tile_momentum,
)
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
  'given': {
    'adaptive': ('k',),
    'given': ('eta', 'alpha'),
    'key_norm': False,
  },
  'anchor_zero': {'anchor': 'zero', 'adaptive': ('k', 'v', 'alpha')},
  'momentum': {'momentum': True},
  'momentum_anchor_zero': {'momentum': True, 'anchor': 'zero'},
  'momentum_without_delta': {
    'momentum': True,
    'adaptive': ('v', 'alpha'),
    'given': ('eta',),
    'delta': False,
    'anchor': 'zero',
  },
  'momentum_boundary_read': {'momentum': True, 'read': 'boundary'},
  'momentum_dot': {
    'momentum': True,
    'objective': 'dot',
    'identity': ('mem',),
    'adaptive': ('q', 'k', 'eta'),
    'retention': False,
  },
}
# What they try, the others try too, beside something else.
SLOW = 'mem_alone_dot', 'titans', 'momentum', 'anchor_zero'
TOGETHER = 'default', 'momentum'


def head(cfg, resets):
  """One head's initial values, state and chunk, all float64."""
  initial = cases.initial_values(cfg, jnp.float64)
  initial = jax.tree.map(lambda x: x[0], initial)
  R = max(stop for _, stop in cfg.rows(K).values())
  keys = jax.random.split(jax.random.key(3), 9)
  first = keys[: 2 + cfg.momentum]
  state = tuple(0.3 * jax.random.normal(key, (R, K)) for key in first)
  streams = tuple(jax.random.normal(key, (C, K)) for key in keys[3:6])
  for name, key in zip(('beta', 'eta', 'alpha'), keys[6:]):
    if name in tile_front.handed(cfg):
      log = jax.nn.log_sigmoid(jax.random.normal(key, (C,)))
      streams = *streams, jnp.exp(log) if name == 'eta' else log
  reset = jnp.zeros((C,), bool).at[jnp.array([5, 11])].set(True)
  live = jnp.arange(C) < 13
  return initial, state, streams, (reset, live) if resets else (None, None)


def by_chunk_step(cfg, marks, together):
  """(boundary, running, output), as a function of all that is real."""

  def run(initial, state, streams):
    boundary, running, *momentum = state
    boundary = running if together else boundary
    handed = dict(zip(tile_front.handed(cfg), streams[3:]))
    state = [Weights(x, {}) for x in (boundary, running, *momentum)]
    (boundary, running, momentum), out = chunk_step(
      cfg,
      initial,
      stack_initial(cfg, initial),
      state if cfg.momentum else (*state, None),
      Chunk(
        *streams[:3],
        handed.get('beta'),
        *marks,
        handed.get('eta'),
        handed.get('alpha'),
      ),
      jnp.float64,
    )
    boundary = 0.0 if together else boundary.stack
    end = boundary, running.stack, momentum.stack if cfg.momentum else None
    return end, out

  return run


def by_tiles(cfg, marks, together, given, gradients):
  """The same and its gradients, from the tiles."""
  initial, state, streams = given
  slow = lay(cfg, stack_initial(cfg, initial).stack, K)
  slow = slow._replace(
    gates_8xK=as_rows([initial[gate]['kernel'] for gate in GATES])
  )
  bias = as_rows([initial[gate]['bias'][None] for gate in GATES])

  def laid(boundary, running, momentum=None):
    boundary = None if together else boundary
    every = boundary, running, momentum
    return tile_front.State(
      *(None if x is None else lay(cfg, x, K) for x in every)
    )

  rows = laid_marks(*(None if m is None else m[None, None] for m in marks))
  tokens = tile_front.Tokens(
    *streams[:3],
    None if rows is None else rows[0, 0],
    jnp.stack(streams[3:]) if streams[3:] else None,
  )
  forward = tile_momentum.forward_steps if cfg.momentum else tile.forward_steps
  end, out, saved = steps.last(
    forward(cfg, slow, bias, laid(*state), tokens, jnp.float64)
  )
  backward = tile_backward.backward_steps(
    cfg, slow, bias, saved, tokens, laid(*gradients[0]), gradients[1],
    jnp.float64,
  )  # fmt: skip
  d_before, d_slow, d_logit, d_tokens = steps.last(backward)
  d_initial = {
    box: {'kernel': d_slow.maps_KxM[:, i * K : (i + 1) * K].T}
    for i, box in enumerate(cfg.boxes)
  } | {
    gate: {'kernel': d_slow.gates_8xK[i], 'bias': d_logit[i].sum()}
    for i, gate in enumerate(GATES)
  }

  def stacks(fast, boundary):
    running = [unlay(cfg, x) for x in fast[1:] if x is not None]
    return boundary if together else unlay(cfg, fast.boundary), *running

  values = stacks(end, 0.0), out
  d_state = stacks(d_before, jnp.zeros_like(state[0]))
  if tile_front.handed(cfg):
    d_tokens = *d_tokens[:3], *d_tokens.handed_RxC
  return values, (d_initial, d_state, d_tokens)


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
        marks=() if name in TOGETHER else pytest.mark.slow,
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
