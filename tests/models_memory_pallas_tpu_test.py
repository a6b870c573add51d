"""The TPU kernels, interpreted, against the token rule; what they refuse."""

import logging

import jax
import jax.numpy as jnp
import memory_cases as cases
import pytest

from nestax.models.memory import api, pallas_tpu
from nestax.models.memory.types import MemoryConfig, init_state

B, H, K = cases.B, cases.H, cases.K
PUSHED = {'momentum': True}
TITANS = PUSHED | {'adaptive': (), 'generated': False, 'delta': False}


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
  names = ('query', 'key', 'value', 'log_beta')[: 3 + cfg.momentum]
  return run(initial, fast, {name: getattr(inputs, name) for name in names})


def apart(cfg, initial):
  """State of two sequences whose clocks differ: 0 and 3 tokens read."""
  empty = init_state(cfg, B, H, K)
  piece = cases.inputs(cfg, jnp.float32, length=3, seed=7, resets=False)
  read, _ = api.run(cfg, initial, empty, piece, implementation='token')
  return jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), empty, read)


@pytest.mark.parametrize(
  'chunks,options,stream,resets,dtype,tolerance',
  [
    ((8, 8), {}, False, False, 'float32', 2e-5),
    ((8, 8), {}, False, False, 'bfloat16', 6e-2),
    ((16, 8), {}, True, True, 'float32', 2e-5),
    ((8, 8), PUSHED, False, False, 'bfloat16', 6e-2),
    ((8, 16), PUSHED, True, True, 'float32', 2e-5),
    pytest.param(
      *((8, 8), TITANS, False, True, 'float32', 2e-5), marks=pytest.mark.slow
    ),
  ],
  ids=[
    'fresh',
    'fresh bfloat16',
    'stream with resets',
    'momentum bfloat16',
    'momentum stream with resets',
    'momentum alone',
  ],
)
def test_kernels_equal_the_token_rule(
  chunks, options, stream, resets, dtype, tolerance
):
  cfg = MemoryConfig(*chunks, **options)
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32, resets=resets)
  state = apart(cfg, initial) if stream else None
  args = cfg, initial, state, inputs, dtype
  got = everything(*args, 'pallas')
  cases.assert_close(got, everything(*args, 'token'), tolerance)


@pytest.mark.parametrize(
  'options,words',
  [
    ({'depth_mem': 2}, 'two-layer.*mem'),
    ({'anchor': 'zero'}, "anchor='zero'"),
    ({'adaptive': (), 'given': ('eta',)}, "given=.'eta'"),
    ({'key_norm': False}, 'key_norm=False'),
    ({'chunk_mem': 12, 'chunk_rest': 12}, '12 tokens.*power of two'),
  ],
)
def test_what_does_not_fit_is_refused_in_words(options, words):
  cfg = MemoryConfig(**options)
  inputs = cases.inputs(cfg, jnp.float32)
  with pytest.raises(pallas_tpu.DoesNotFit, match=words):
    api.run(cfg, {}, None, inputs, implementation='pallas')


def test_what_does_not_fit_runs_by_scan_and_says_so_once(monkeypatch, caplog):
  cfg = MemoryConfig(8, 8, anchor='zero')
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  api.say_once.cache_clear()
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      api.run(cfg, initial, None, inputs)
  assert caplog.text.count('lax.scan') == 1
  assert "anchor='zero'" in caplog.text
