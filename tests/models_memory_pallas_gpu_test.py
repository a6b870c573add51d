"""The GPU kernels, interpreted, against the token rule; what they refuse."""

import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import memory_cases as cases
import pytest

from nestax.models.families import FAMILY
from nestax.models.memory import api, gpu_turn, pallas_gpu
from nestax.models.memory.gpu_tile import Dots
from nestax.models.memory.types import MemoryConfig, init_state

C = 16
LENGTH = 2 * C + 5  # the last chunk is not filled
RULES = {
  'default': {},
  'boundary_read': {
    'read': 'boundary',
    'retention': False,
    'value_norm': False,
  },  # fmt: skip
  'dot': {'objective': 'dot', 'identity': ('k', 'mem')},
  'one_slow_gate': {'adaptive': ('v', 'alpha'), 'identity': ('v', 'mem')},
  'mem_alone': {
    'adaptive': (),
    'identity': (),
    'generated': False,
    'delta': False,
  },
  'mem_alone_dot': {
    'adaptive': (),
    'identity': (),
    'generated': False,
    'objective': 'dot',
  },
  'titans': {'adaptive': (), 'generated': False, 'delta': False},
  'values_not_generated': {'adaptive': ('k', 'v'), 'generated': False},
  'given_beside_own': {'adaptive': ('k', 'alpha'), 'given': ('eta',)},
  'plain_keys': {
    'key_norm': False,
    'delta': False,
    'objective': 'dot',
    'identity': ('k', 'mem'),
  },
}
RULES |= {
  name: FAMILY[name].rule
  for name in ('gated_deltanet', 'deltanet', 'retnet', 'ttt_linear')
}
# What they try, the others try too, beside something else.
SLOW = (
  'mem_alone_dot', 'titans', 'values_not_generated', 'given_beside_own',
  'plain_keys', 'deltanet', 'ttt_linear',
)  # fmt: skip


@pytest.fixture(autouse=True)
def wide_heads(monkeypatch):
  """The kernels' smallest head."""
  monkeypatch.setattr(cases, 'K', 16)


def rule(**options):
  return MemoryConfig(chunk_mem=C, chunk_rest=C, **options)


def case(cfg, *args, **options):
  """(Initial values, inputs), some of whose rates are zero."""
  initial = cases.initial_values(cfg, jnp.float32)
  initial = {name: x for name, x in initial.items() if name not in cfg.given}
  inputs = cases.inputs(cfg, jnp.float32, *args, **options)
  if inputs.eta is not None:
    inputs = inputs._replace(eta=inputs.eta.at[:, 3].set(0.0))
  if not cfg.key_norm:  # of length 1 or so, as others are
    inputs = inputs._replace(key=inputs.key * cases.K**-0.5)
  return initial, inputs


def everything(cfg, initial, state, inputs, dtype, implementation, **options):
  """Outputs, end state and gradients of all that is real."""

  @jax.jit
  def run(initial, fast, streams):
    def values(initial, fast, streams):
      start = None if fast is None else state._replace(**fast)
      if options.get('aligned'):
        start = start._replace(boundary=start.running)
      here = cfg, initial, start, inputs._replace(**streams)
      if implementation == 'gpu':
        end, out = pallas_gpu.run(*here, dtype, **options)
      else:
        end, out = api.run(
          *here, dtype=dtype, implementation=implementation, **options
        )
      ends = ()
      if end is not None:
        ends = end.boundary.stack, end.running.stack, end.momentum
      if 'length_B' in options:
        # past a row's length outputs mean nothing
        counts = jnp.arange(out.shape[1])[None] < options['length_B'][:, None]
        out = jnp.where(counts[:, :, None, None], out, 0.0)
      return out, ends

    got, back = jax.vjp(values, initial, fast, streams)
    return got, back(jax.tree.map(lambda x: jnp.cos(3 * x), got))

  fast = None
  if state is not None:
    fast = {'boundary': state.boundary, 'running': state.running}
    if cfg.momentum:
      fast['momentum'] = state.momentum
  streams = inputs._replace(reset=None)._asdict()
  streams = {name: x for name, x in streams.items() if x is not None}
  return run(initial, fast, streams)


@pytest.mark.parametrize(
  'name,resets',
  [
    pytest.param('default', False, marks=pytest.mark.slow),
    *(
      pytest.param(
        *(name, True), marks=pytest.mark.slow if name in SLOW else ()
      )
      for name in RULES
    ),
  ],
)
def test_kernels_equal_the_token_rule(name, resets):
  cfg = rule(**RULES[name])
  initial, inputs = case(cfg, LENGTH, resets=resets)
  args = cfg, initial, None, inputs, 'float32'
  got = everything(*args, 'gpu')
  cases.assert_close(got, everything(*args, 'token'), 3e-5)


def test_kernels_in_bfloat16_equal_the_token_rule():
  cfg = rule()
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32, LENGTH, resets=False)
  args = cfg, initial, None, inputs, 'bfloat16'
  got = everything(*args, 'gpu')
  cases.assert_close(got, everything(*args, 'token'), 6e-2)


def test_kernels_with_momentum_alone_equal_the_token_rule():
  """Without documents."""
  cfg = rule(**FAMILY['titans'].rule)
  initial, inputs = case(cfg, LENGTH, resets=False)
  # momenta that last from chunk to chunk
  inputs = inputs._replace(log_beta=0.1 * inputs.log_beta)
  args = cfg, initial, None, inputs, 'float32'
  got = everything(*args, 'gpu')
  cases.assert_close(got, everything(*args, 'token'), 3e-5)


@pytest.mark.parametrize(
  'stream',
  [
    pytest.param(False, marks=pytest.mark.slow, id='fresh'),
    pytest.param(True, id='stream'),
  ],
)
def test_kernels_with_momentum_equal_the_token_rule(stream):
  """Without documents; from inside a chunk, with some."""
  cfg = rule(momentum=True)
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32, LENGTH, resets=stream)
  # momenta that last from chunk to chunk, and multiply what is rounded
  inputs = inputs._replace(log_beta=0.1 * inputs.log_beta)
  state = cases.read_so_far(cfg, initial) if stream else None
  args = cfg, initial, state, inputs, 'float32'
  got = everything(*args, 'gpu')
  cases.assert_close(got, everything(*args, 'token'), 1e-4)


@pytest.mark.parametrize(
  'length,resets',
  [
    pytest.param(LENGTH, False, id='long'),
    pytest.param(C - 4, True, marks=pytest.mark.slow, id='short'),
  ],
)
def test_a_stream_from_inside_a_chunk_equals_the_token_rule(length, resets):
  cfg = rule()
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32, length, resets=resets)
  args = cfg, initial, cases.read_so_far(cfg, initial), inputs, 'float32'
  got = everything(*args, 'gpu')
  cases.assert_close(got, everything(*args, 'token'), 3e-5)


def test_an_aligned_stream_of_rows_of_unequal_length_equals_scan(monkeypatch):
  # as with heads of 128, of which less is kept at hand
  monkeypatch.setattr(gpu_turn, 'NARROW', 0)
  cfg = rule()
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32, LENGTH)
  state = init_state(cfg, cases.B, cases.H, cases.K)
  one = jnp.ones_like(state.running.stack)
  weights = state.running._replace(stack=0.1 * one)
  state = state._replace(boundary=weights, running=weights)
  options = {'aligned': True, 'length_B': jnp.array([LENGTH, 7])}
  args = cfg, initial, state, inputs, 'float32'
  got = everything(*args, 'gpu', **options)
  cases.assert_close(got, everything(*args, 'scan', **options), 3e-5)


@pytest.mark.slow
def test_heads_of_128_equal_scan(monkeypatch):
  for name, size in {'B': 1, 'H': 1, 'K': 128}.items():
    monkeypatch.setattr(cases, name, size)
  cfg = MemoryConfig(chunk_mem=64, chunk_rest=64)
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32, 2 * 64 + 5)
  # shared memory is a GPU's: interpreted, wider numbers fit
  monkeypatch.setattr(pallas_gpu, 'check', lambda *args: None)
  args = cfg, initial, None, inputs, 'float32'
  got = everything(*args, 'gpu')
  cases.assert_close(got, everything(*args, 'scan'), 3e-5)


@pytest.mark.parametrize(
  'C,dtype,momentum',
  [(64, 'float32', False), (32, 'bfloat16', False), (64, 'bfloat16', True)],
)
def test_heads_of_128_fit_in_one_way_only(C, dtype, momentum):
  cfg = MemoryConfig(chunk_mem=64, chunk_rest=64)
  pallas_gpu.check(cfg, 64, 128, 'bfloat16')
  cfg = MemoryConfig(chunk_mem=C, chunk_rest=C, momentum=momentum)
  words = f'heads of width 128, chunks of {C} .*{dtype}, momentum={momentum}'
  with pytest.raises(pallas_gpu.DoesNotFit, match=words):
    pallas_gpu.check(cfg, C, 128, dtype)
  with pytest.raises(pallas_gpu.DoesNotFit, match='width 256: one of'):
    pallas_gpu.check(cfg, C, 256, dtype)


@pytest.mark.parametrize(
  'dtype,resets,options',
  [
    ('float32', False, {}),
    ('float32', True, {}),
    ('bfloat16', True, {}),
    ('bfloat16', False, {}),
    ('bfloat16', True, {'momentum': True}),
    ('bfloat16', True, FAMILY['gated_deltanet'].rule),
  ],
)
def test_kernels_lower_for_cuda_without_a_gpu(dtype, resets, options):
  cfg = rule(**options)
  initial, inputs = case(cfg, resets=resets)
  inputs = inputs._replace(query=inputs.query.astype(dtype))

  def loss(initial, query):
    here = inputs._replace(query=query)
    state = init_state(cfg, cases.B, cases.H, cases.K)
    end, out = pallas_gpu.run(cfg, initial, state, here, dtype, aligned=True)
    return jnp.sum(out) + jnp.sum(end.boundary.stack)

  device = jax.sharding.AbstractDevice('NVIDIA H100', 132, 'gpu')
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((1,), ('x',), auto, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(initial, inputs.query)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  names = ('walk', 'link', 'carry', 'output', 'carry_back', 'parts')
  if not cfg.given:
    names = (*names, 'turn')
  if cfg.momentum:
    names = (*names, 'write', 'read', 'over', 'last')
    names = tuple(f'momentum_{name}' for name in names)
  else:
    names = (*names, 'by_output')
  names = (*names, 'finish' if cfg.given else 'collect', 'collect_mem')
  assert [name for name in names if f'memory_{name}' not in text] == []


@pytest.mark.parametrize(
  'options,words',
  [
    ({'depth_rest': 2}, 'two-layer.*only `mem`'),
    ({'momentum': True, 'identity': ('k',)}, "momentum=True, identity=.'k'"),
    ({'momentum': True, 'objective': 'dot'}, "momentum=True.*only 'l2'"),
    ({'anchor': 'zero'}, "anchor='zero'"),
    ({'chunk_mem': 32}, '16 and 32 tokens.*equal'),
    ({'chunk_mem': 48, 'chunk_rest': 48}, '48 tokens.*one of'),
    ({'adaptive': ('q',)}, "without 'q'"),
    (
      {'depth_mem': 2, 'adaptive': ('k',), 'given': ('eta',)},
      "two-layer `mem`, given=.'eta'",
    ),
    ({'depth_mem': 2, 'key_norm': False}, 'two-layer `mem`.* key_norm=False'),
  ],
)
def test_what_does_not_fit_is_refused_in_words(options, words):
  cfg = MemoryConfig(**{'chunk_mem': C, 'chunk_rest': C} | options)
  inputs = cases.inputs(cfg, jnp.float32)
  with pytest.raises(pallas_gpu.DoesNotFit, match=words):
    pallas_gpu.run(cfg, {}, None, inputs, 'float32')


def test_a_gpu_gets_its_kernels_and_scan_where_they_do_not_fit(
  monkeypatch, caplog
):
  calls = []

  def ask(cfg, dtype=jnp.float32, length=cases.L):
    jax.eval_shape(  # what is chosen is chosen before anything runs
      lambda: api.run(
        cfg,
        cases.initial_values(cfg, jnp.float32),
        None,
        cases.inputs(cfg, dtype, length),
        dtype=dtype,
      )
    )

  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(pallas_gpu, 'capability', lambda: '9.0')
  monkeypatch.setattr(
    pallas_gpu,
    'run',
    lambda cfg, *args: calls.append((cfg.depth_mem, cfg.momentum)),
  )
  api.say_once.cache_clear()
  with caplog.at_level(logging.WARNING):
    for deep in (False, True, True):
      ask(rule(depth_rest=1 + deep))
    ask(rule(depth_mem=2))
    ask(rule(depth_mem=2, stride=4), length=64 * C - 1)
    ask(rule(depth_mem=2, stride=4), length=64 * C)
    ask(rule(momentum=True))
    ask(rule(**FAMILY['retnet'].rule))
    monkeypatch.setattr(pallas_gpu, 'capability', lambda: '8.6')
    ask(rule())
    monkeypatch.setattr(pallas_gpu, 'capability', lambda: '9.0')
    monkeypatch.setattr(cases, 'K', 128)
    ask(MemoryConfig(chunk_mem=64, chunk_rest=64), jnp.bfloat16)
    # put on the machine's CPU it is scanned, which is no news
    monkeypatch.setattr(cases, 'K', 16)
    with jax.default_device(jax.devices('cpu')[0]):
      ask(rule(momentum=True))
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1,), ('data',), axis_types=auto)):
      ask(rule(momentum=True))
  assert calls == [(1, False), (2, False), (1, True), (1, False), (1, False)]
  assert caplog.text.count('lax.scan') == 3
  assert 'of long streams, strides of more than 1' in caplog.text
  assert 'two-layer' in caplog.text
  assert "capability '8.6'" in caplog.text


def test_a_wide_side_is_not_rounded():
  dots = Dots(jnp.dtype('bfloat16'), True)
  a, b = jax.random.normal(jax.random.key(0), (2, 32, 16))
  a = a.astype(jnp.bfloat16)
  want = jnp.matmul(a.T.astype(jnp.float32), b, precision='highest')
  error = jnp.linalg.norm(dots.tn_wide(a, b) - want) / jnp.linalg.norm(want)
  assert error < 2e-5 < 1e-3 < jnp.linalg.norm(dots.tn(a, b) - want)


WITHOUT = """
import sys
sys.modules['jax.experimental.pallas.triton'] = None
import jax.numpy as jnp
from nestax.models import flash_gpu, language_model
from nestax.models.memory import pallas_gpu
from nestax.models.memory.types import MemoryConfig
print(flash_gpu.unfit(jnp.bfloat16, 64))
try:
  pallas_gpu.check(MemoryConfig(64, 64), 64, 64, jnp.bfloat16)
except pallas_gpu.DoesNotFit as error:
  print(error)
"""


def test_a_jax_that_has_left_pallas_triton_out_has_no_kernels_and_runs():
  ran = subprocess.run(
    [sys.executable, '-c', WITHOUT], capture_output=True, text=True
  )
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout == 2 * 'this version of JAX has no Pallas Triton\n'
