"""Two-layer memories on tiles against `chunk_step` and its derivatives."""

import jax
import jax.numpy as jnp
import memory_cases as cases
import numpy as np
import pytest

from nestax.models.memory import (
  steps,
  tile_deep,
  tile_deep_backward,
  tile_deep_ops,
  tile_front,
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
  'mem': {},
  'rest': {
    'depth_mem': 1,
    'depth_rest': 2,
    'adaptive': ('q', 'k', 'v', 'alpha'),
    'identity': ('k',),
  },
  'momentum zero': {
    'momentum': True,
    'anchor': 'zero',
    'adaptive': ('alpha',),
  },
  'all momentum': {'depth_rest': 2, 'momentum': True},
  'unbounded dot boundary': {
    'bounded': False,
    'objective': 'dot',
    'read': 'boundary',
    'identity': ('k', 'mem'),
  },
  'titans': {
    'adaptive': (),
    'generated': False,
    'delta': False,
    'momentum': True,
    'given': ('eta', 'alpha'),
  },
  'zero without delta': {
    'anchor': 'zero',
    'delta': False,
    'key_norm': False,
    'value_norm': False,
    'retention': False,
    'adaptive': ('v', 'eta'),
  },
}
# What they try is tried beside something else, or in one layer.
SLOW = 'rest', 'all momentum', 'unbounded dot boundary', 'zero without delta'


def head(cfg):
  """One head's initial values, state and streams, all float64.

  So large that some tokens' steps are divided by their gains, some not.
  """
  initial = cases.initial_values(cfg, jnp.float64)
  initial = jax.tree.map(lambda x: x[0], initial)
  gain = {'inner': 3.0, 'outer': 2.0}
  for box in cfg.deep:
    initial[box] = {name: gain[name] * w for name, w in initial[box].items()}
  like = stack_initial(cfg, initial)
  keys = iter(jax.random.split(jax.random.key(3), 32))
  state = [
    jax.tree.map(lambda w: 0.3 * jax.random.normal(next(keys), w.shape), like)
    for _ in range(2 + cfg.momentum)
  ]
  streams = [jax.random.normal(next(keys), (C, K)) for _ in range(3)]
  for name in tile_front.handed(cfg):
    log = jax.nn.log_sigmoid(jax.random.normal(next(keys), (C,)))
    # a rate of zero has a gradient, too
    streams.append(jnp.exp(log).at[3].set(0.0) if name == 'eta' else log)
  return initial, state, streams


def by_chunk_step(cfg, marks, together, initial, state, streams):
  """(State after a chunk, output); the boundary is 0 if it is `together`."""
  boundary, running, *momentum = state
  handed = dict(zip(tile_front.handed(cfg), streams[3:]))
  (boundary, *end), out = chunk_step(
    cfg,
    initial,
    stack_initial(cfg, initial),
    (running if together else boundary, running, *(momentum or [None])),
    Chunk(
      *streams[:3], handed.get('beta'), *marks,
      handed.get('eta'), handed.get('alpha'),
    ),
    jnp.float64,
  )  # fmt: skip
  boundary = jax.tree.map(jnp.zeros_like, boundary) if together else boundary
  return (boundary, *end), out


def by_tiles(cfg, marks, together, given, gradients):
  """The same and its gradients, from the tiles."""
  initial, state, streams = given
  slow = stack_initial(cfg, initial)
  slow = lay(cfg, slow.stack, K, slow.outer)
  slow = slow._replace(
    gates_8xK=as_rows([initial[gate]['kernel'] for gate in GATES])
  )
  bias = as_rows([initial[gate]['bias'][None] for gate in GATES])

  def laid(state):
    every = [x and lay(cfg, x.stack, K, x.outer) for x in state]
    every += [None] * (3 - len(every))
    return tile_front.State(None if together else every[0], *every[1:])

  def back(fast, boundary):
    every = [
      x and Weights(unlay(cfg, x), {box: w.T for box, w in x.outer.items()})
      for x in fast
    ]
    return boundary if together else every[0], *every[1:]

  rows = laid_marks(*(None if m is None else m[None, None] for m in marks))
  tokens = tile_front.Tokens(
    *streams[:3],
    None if rows is None else rows[0, 0],
    jnp.stack(streams[3:]) if streams[3:] else None,
  )
  end, out, saved = steps.last(
    tile_deep.forward_steps(cfg, slow, bias, laid(state), tokens, jnp.float64)
  )
  of_end, of_out = gradients
  args = slow, bias, saved, tokens, laid(of_end), of_out
  ((d_state, d_slow, d_logit, d_tokens),) = tile_deep_backward.backward(
    cfg, [args], jnp.float64
  )
  d_initial = {}
  for box in cfg.boxes:
    start, stop = cfg.rows(K)[box]
    first = d_slow.maps_KxM[:, start:stop].T
    d_initial[box] = (
      {'inner': first, 'outer': d_slow.outer[box].T}
      if box in cfg.deep
      else {'kernel': first}
    )
  d_initial |= {
    gate: {'kernel': d_slow.gates_8xK[i], 'bias': d_logit[i].sum()}
    for i, gate in enumerate(GATES)
  }
  zero = jax.tree.map(jnp.zeros_like, state[0])
  d_streams = list(d_tokens[:3])
  if tile_front.handed(cfg):
    d_streams += list(d_tokens.handed_RxC)
  d_state = [x for x in back(d_state, zero) if x is not None]
  return (back(end, zero), out), (d_initial, d_state, d_streams)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
    for name in RULES
  ],
)
def test_tiles_equal_chunk_step_in_value_and_gradient(name):
  options = {'depth_mem': 2, 'expansion': 2} | RULES[name]
  cfg = MemoryConfig(chunk_mem=C, chunk_rest=C, **options)
  together = name == 'mem'  # the others hold documents and empty places
  marks = None, None
  if not together:
    reset = jnp.zeros((C,), bool).at[jnp.array([5, 11])].set(True)
    marks = reset, jnp.arange(C) < 13
  with jax.enable_x64(True):
    given = head(cfg)

    @jax.jit
    def want(given):
      values, back = jax.vjp(
        lambda given: by_chunk_step(cfg, marks, together, *given), given
      )
      gradients = jax.tree.map(lambda x: jnp.cos(3 * x), values)
      return values, *back(gradients), gradients

    values, derivatives, gradients = want(given)
    got = jax.jit(lambda *args: by_tiles(cfg, marks, together, *args))
    got = got(given, gradients)
    cases.assert_close(got, (values, derivatives), 1e-11)


def test_derivatives_of_gelu():
  ours, slope_of = tile_deep_ops.gelu, tile_deep_ops.gelu_slope
  slope = jax.grad(jax.nn.gelu)
  with jax.enable_x64(True):
    x = jnp.linspace(-4.0, 4.0, 97)
    for got, want in (
      (ours, jax.nn.gelu),
      (jax.grad(ours), slope),
      (lambda x: slope_of(x)[1], slope),
      (jax.grad(lambda x: slope_of(x)[1]), jax.grad(slope)),
      (jax.grad(lambda x: slope_of(x)[0]), slope),
    ):
      got, want = jax.vmap(got)(x), jax.vmap(want)(x)
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
