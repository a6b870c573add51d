"""The TPU kernels, interpreted, against the token rule; what they refuse."""

import functools
import logging

import jax
import jax.numpy as jnp
import memory_cases as cases
import pytest
from jax.experimental import pallas as pl

from nestax.models.memory import (
  api,
  pallas_tpu,
  tpu_forward,
  tpu_grid,
  tpu_vmem,
)
from nestax.models.memory.tile_front import Maps, State
from nestax.models.memory.tpu_layout import Given, Shape, Stream
from nestax.models.memory.types import MemoryConfig

B, H, K = cases.B, cases.H, cases.K
PUSHED = {'momentum': True}
DEEP = {'depth_mem': 2, 'expansion': 2}
HANDED = PUSHED | {'adaptive': ('k', 'v', 'alpha'), 'given': ('eta',)}
TITANS = PUSHED | {
  'adaptive': (),
  'generated': False,
  'delta': False,
  'given': ('eta', 'alpha'),
}


def everything(cfg, initial, state, inputs, dtype, implementation):
  """Outputs, end state and gradients of all that is real."""

  @jax.jit
  def run(initial, fast, streams):
    def loss(initial, fast, streams):
      start = None if fast is None else state._replace(**fast)
      end, out = api.run(
        cfg, initial, start, inputs._replace(**streams),
        dtype=dtype, implementation=implementation,
      )  # fmt: skip
      ends = () if end is None else end[:3]
      leaves = [out, *jax.tree.leaves(ends)]
      return sum(
        jnp.sum(jnp.sin((i + 1.0) * x)) for i, x in enumerate(leaves)
      ), (
        end,
        out,
      )

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
      initial, fast, streams
    )

  fast = None
  if state is not None:
    fast = {
      name: getattr(state, name)
      for name in ('boundary', 'running', 'momentum')[: 2 + cfg.momentum]
    }
  streams = inputs._replace(reset=None)._asdict()
  streams = {name: x for name, x in streams.items() if x is not None}
  return run(initial, fast, streams)


# name -> (chunks, options, stream, resets, dtype, tolerance)
RULES = {
  'fresh': ((8, 8), {}, False, False, 'float32', 2e-5),
  'fresh bfloat16': ((8, 8), {}, False, False, 'bfloat16', 6e-2),
  'stream with resets': ((16, 8), {}, True, True, 'float32', 2e-5),
  'momentum bfloat16': ((8, 8), PUSHED, False, False, 'bfloat16', 6e-2),
  'momentum stream with resets': (
    *((8, 16), HANDED, True, True, 'float32', 2e-5),
  ),
  'momentum alone': ((8, 8), TITANS, False, True, 'float32', 2e-5),
  'deep stream with resets': (
    *((16, 8), DEEP | {'depth_rest': 2, 'adaptive': ('v', 'alpha')}),
    *(True, True, 'float32', 2e-5),
  ),
  'deep bfloat16': ((8, 8), DEEP, False, False, 'bfloat16', 6e-2),
  'deep momentum': (
    *((8, 16), DEEP | HANDED | {'anchor': 'zero'}),
    *(True, True, 'float32', 2e-5),
  ),
  'deep Titans': ((8, 8), DEEP | TITANS, False, True, 'float32', 2e-5),
}
SLOW = (
  *('momentum alone', 'momentum bfloat16'),
  *('deep bfloat16', 'deep momentum', 'deep Titans'),
)


@functools.cache
def found(name, implementation, stride=1):
  chunks, options, stream, resets, dtype, _ = RULES[name]
  cfg = MemoryConfig(*chunks, **options, stride=stride)
  initial = cases.initial_values(cfg, jnp.float32)
  initial = {name: x for name, x in initial.items() if name not in cfg.given}
  inputs = cases.inputs(cfg, jnp.float32, length=17, resets=resets)
  state = cases.read_so_far(cfg, initial) if stream else None
  return everything(cfg, initial, state, inputs, dtype, implementation)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in RULES
  ],
)
def test_kernels_equal_the_token_rule(name):
  *_, tolerance = RULES[name]
  cases.assert_close(found(name, 'pallas'), found(name, 'token'), tolerance)


# 17 tokens lie in 3 chunks of 8: in one segment, or in one of 2 and one of 1
@pytest.mark.parametrize(
  'name,stride',
  [
    ('fresh bfloat16', 100),
    ('stream with resets', 2),
    pytest.param('momentum stream with resets', 2, marks=pytest.mark.slow),
    pytest.param('stream with resets', 3, marks=pytest.mark.slow),
    pytest.param('deep stream with resets', 2, marks=pytest.mark.slow),
  ],
)
def test_chunks_walked_again_come_out_the_same(name, stride):
  got, want = found(name, 'pallas', stride), found(name, 'pallas')
  cases.assert_close(got, want, 1e-6)


def test_boundaries_are_kept_at_the_stride():
  """Of 5 chunks, by 2: of 3 the state at their start, nothing of the others."""
  state = State(
    None, Maps(jnp.zeros((1, 2, 4, 12)), jnp.zeros((1, 2, 8, 4))), None
  )
  slow = Maps(jnp.zeros((2, 4, 12)), jnp.zeros((2, 8, 4)))
  given = Given(slow, jnp.zeros((2, 8, 1)), state)
  tokens = 3 * [jnp.zeros((1, 40, 8))]
  stream = Stream(*tokens, None, None, None)
  shape = Shape(MemoryConfig(8, 8, stride=2), 'bfloat16', 8, 5, 2, 2)
  forward = functools.partial(tpu_forward.forward, shape, True, True)
  _, kept = jax.eval_shape(forward, given, stream)
  assert [x.shape for x in jax.tree.leaves(kept)] == [
    (1, 2, 3, 4, 12),
    (1, 2, 3, 8, 4),
  ]


def test_what_does_not_fit_is_refused_in_words():
  cfg = MemoryConfig(12, 12)
  inputs = cases.inputs(cfg, jnp.float32)
  with pytest.raises(pallas_tpu.DoesNotFit, match='12 tokens.*power of two'):
    api.run(cfg, {}, None, inputs, implementation='pallas')


def test_a_stride_that_vmem_is_too_small_for_is_refused():
  cfg = MemoryConfig(stride=4096)
  size = cfg, 64, 64, 'bfloat16'
  words = 'stride=4096: 200 chunks .* want 48.4 MiB .* 32.0 MiB .* up to 132'
  with pytest.raises(pallas_tpu.DoesNotFit, match=words):
    pallas_tpu.check(*size, n=200)
  # wide heads' blocks leave less: libtpu refuses this for a v5p
  gates = 'q', 'k', 'v', 'eta', 'alpha'
  wide = MemoryConfig(8, 16, momentum=True, stride=9, adaptive=gates)
  with pytest.raises(pallas_tpu.DoesNotFit, match='6.0 MiB .* up to 1 are'):
    pallas_tpu.check(wide, 8, 256, 'bfloat16')
  pallas_tpu.check(*size, n=132)  # no more are walked back in


def test_memories_that_vmem_is_too_small_for_are_refused():
  cfg = MemoryConfig(256, 256, depth_mem=2)
  words = "width 256, chunks of 256 .*two-layer memories .'mem',.* 96.8 MiB"
  with pytest.raises(pallas_tpu.DoesNotFit, match=words):
    pallas_tpu.check(cfg, 256, 256, 'bfloat16')
  pallas_tpu.check(cfg, 64, 256, 'bfloat16')


@pytest.mark.parametrize(
  'options,H,K,C,dtype,heads',
  [
    ({}, 4, 32, 256, 'bfloat16', 4),
    (DEEP, 4, 128, 128, 'bfloat16', 2),
    (DEEP, 3, 128, 128, 'bfloat16', 1),
    # libtpu has 62 MiB for two where each chunk starts from the boundary
    ({}, 4, 256, 256, 'float32', 1),
    ({}, 4, 256, 64, 'float32', 2),
  ],
)
def test_two_heads_are_walked_in_turn_where_both_fit(
  options, H, K, C, dtype, heads
):
  cfg = MemoryConfig(C, C, **options)
  assert tpu_vmem.heads_a_step(cfg, C, H, K, dtype) == heads


@pytest.mark.parametrize(
  'options,H,K,C,dtype,heads',
  [
    ({}, 4, 128, 128, 'bfloat16', 4),
    ({}, 8, 64, 64, 'bfloat16', 4),
    ({}, 6, 128, 128, 'bfloat16', 2),
    ({}, 3, 64, 64, 'bfloat16', 4),  # one of them is padding
    ({}, 3, 128, 128, 'bfloat16', 1),
    ({}, 4, 128, 256, 'bfloat16', 2),  # a program too long
    (DEEP | PUSHED, 4, 256, 128, 'bfloat16', 1),
  ],
)
def test_twice_the_heads_are_walked_forward(options, H, K, C, dtype, heads):
  cfg = MemoryConfig(C, C, **options)
  assert tpu_vmem.heads_ahead(cfg, C, H, K, dtype) == heads


def test_more_heads_ahead_than_back_change_nothing(monkeypatch):
  name = 'stream with resets'
  monkeypatch.setattr(tpu_vmem, 'LANES', K + 1)
  words = MemoryConfig(*RULES[name][0]), 16, H, K, 'float32'
  assert tpu_vmem.heads_a_step(*words) == 1
  assert tpu_vmem.heads_ahead(*words) == 2
  got = found.__wrapped__(name, 'pallas')
  cases.assert_close(got, found(name, 'token'), RULES[name][-1])


def test_blocks_are_copied_whole():
  x = jnp.arange(2.0 * 96 * 8).reshape(1, 2, 96, 8)

  def kernel(x_ref, y_ref):
    tpu_grid.copy(y_ref, x_ref)

  y = pl.pallas_call(kernel, out_shape=x, interpret=True)(x)
  assert jnp.array_equal(x, y)


@pytest.mark.parametrize('options', [{}, PUSHED, DEEP])
def test_tpus_take_the_kernels_unasked(options, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  taken = []
  monkeypatch.setattr(pallas_tpu, 'run', lambda cfg, *_: taken.append(cfg))
  cfg = MemoryConfig(8, 8, **options)
  api.run(cfg, {}, None, cases.inputs(cfg, jnp.float32))
  assert taken == [cfg]


def test_what_does_not_fit_runs_by_scan_and_says_so_once(monkeypatch, caplog):
  cfg = MemoryConfig(12, 12)
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  api.say_once.cache_clear()
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      api.run(cfg, initial, None, inputs)
  assert caplog.text.count('lax.scan') == 1
  assert 'a chunk of 12 tokens' in caplog.text
