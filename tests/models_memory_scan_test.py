"""The chunked memory against the token rule, and the invariants of streams."""

import dataclasses
import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import memory_cases as cases
import numpy as np
import pytest

from nestax.models.memory import api
from nestax.models.memory.types import MemoryConfig, init_state

B, L, H, K = cases.B, cases.L, cases.H, cases.K


def everything(cfg, implementation, dtype):
  """Output, final state and gradients with respect to all that goes in."""

  def loss(initial, state, inputs, weights):
    end, out = api.run(
      cfg, initial, state, inputs, dtype=dtype, implementation=implementation
    )
    floats = (out, end._replace(position_B=None))
    total = sum(
      jnp.sum(jnp.sin(leaf.astype(jnp.float32) * w))
      for leaf, w in zip(jax.tree.leaves(floats), weights, strict=True)
    )
    return total, (end, out)

  @jax.jit
  def run(initial, state, inputs, weights):
    def of_floats(initial, fast, streams):
      if cfg.running:  # where `mem` is one value, its gradient is one
        rows = slice(*cfg.rows(K)['mem'])
        stack = fast[0].stack.at[:, :, rows].set(fast[1].stack[:, :, rows])
        fast = fast[0]._replace(stack=stack), *fast[1:]
      full = state._replace(boundary=fast[0], running=fast[1], momentum=fast[2])
      return loss(initial, full, inputs._replace(**streams), weights)

    streams = inputs._asdict()
    streams.pop('reset')
    return jax.value_and_grad(of_floats, argnums=(0, 1, 2), has_aux=True)(
      initial, tuple(state[:3]), streams
    )

  return run


# What they try, others try too: alone, or beside something else.
SLOW = (
  'one_chunk', 'rest_slower', 'deep_rest', 'unbounded', 'deep_boundary_read',
  'anchor_zero', 'slow_gates', 'no_remat', 'running_dot', 'no_momentum',
  'deep_mem', 'boundary_read', 'adaptive_q', 'dot', 'no_retention',
  'plain_keys', 'no_momentum', 'titans', 'running_zero', 'given_rate',
)  # fmt: skip


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  'name',
  [slow(name) if name in SLOW else name for name in cases.CASES],
)
def test_scan_equals_token_in_value_and_gradient(name):
  cfg = cases.config(name)
  with jax.enable_x64(True):
    dtype = jnp.float64
    initial = cases.initial_values(cfg, dtype)
    state = cases.read_so_far(cfg, initial, dtype=dtype)
    inputs = cases.inputs(cfg, dtype)
    count = len(jax.tree.leaves(state)) + 1
    weights = [1.0 + 0.1 * i for i in range(count - 1)]
    got = everything(cfg, 'scan', dtype)(initial, state, inputs, weights)
    want = everything(cfg, 'token', dtype)(initial, state, inputs, weights)
    cases.assert_close(got, want, 1e-10)


@pytest.mark.parametrize(
  'name,dtype,tolerance',
  [
    slow('deep_mem', 'float32', 2e-5),
    ('default', 'bfloat16', 6e-2),
    slow('default', 'float32', 2e-5),
    slow('deep_mem', 'bfloat16', 6e-2),
  ],
)
def test_fresh_scan_equals_token_at_working_precision(name, dtype, tolerance):
  cfg = cases.config(name)
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32)

  def loss(initial, implementation):
    _, out = api.run(
      cfg, initial, None, inputs, dtype=dtype, implementation=implementation
    )
    return jnp.sum(jnp.sin(out)), out

  grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  (_, got), got_grad = grad(initial, 'scan')
  (_, want), want_grad = grad(initial, 'token')
  cases.assert_close(got, want, tolerance)
  cases.assert_close(got_grad, want_grad, 2 * tolerance)


@pytest.mark.parametrize('remat', [True, False])
def test_scan_keeps_every_other_state(remat):
  """Of 5 chunks: those of 2 segments' first ones, and the last one's."""

  def kept(stride):
    cfg = MemoryConfig(4, 4, stride=stride, remat=remat)
    initial = cases.initial_values(cfg, jnp.float32)
    inputs = cases.inputs(cfg, jnp.float32, length=20, resets=False)

    def back(initial):
      return jax.vjp(
        lambda x: api.run(cfg, x, None, inputs, implementation='scan')[1],
        initial,
      )[1]

    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(back, initial))]
    return {s[:-2] for s in shapes if s[-2:] == (3 * K + 2, K)} - {(H,)}

  assert kept(1) == {(5, B, H)}
  assert kept(2) == {(2, B, H), (B, H)}


STREAM = cases.config('mem_slower')


@jax.jit
def read_stream(state, inputs):
  initial = cases.initial_values(STREAM, jnp.float32)
  return api.run(STREAM, initial, state, inputs, implementation='scan')


# Pieces of three sizes, or every order of them would be compiled again.
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(st.permutations([1, 1, 3, 3, 5]))
def test_a_stream_cut_anywhere_gives_the_same(sizes):
  inputs = cases.inputs(STREAM, jnp.float32)
  empty = init_state(STREAM, B, H, K)
  want_state, want = read_stream(empty, inputs)
  state, outs = empty, []
  assert sum(sizes) == L
  for stop, size in zip(itertools.accumulate(sizes), sizes):
    piece = jax.tree.map(lambda x: x[:, stop - size : stop], inputs)  # noqa: B023
    state, out = read_stream(state, piece)
    outs.append(out)
  cases.assert_close(jnp.concatenate(outs, axis=1), want, 1e-5)
  cases.assert_close(state, want_state, 1e-5)


def test_one_sequence_cannot_change_a_bit_of_another():
  inputs = cases.inputs(STREAM, jnp.float32)
  empty = init_state(STREAM, B, H, K)
  other = jax.tree.map(
    lambda x: x.at[1].set(~x[1] if x.dtype == bool else 2 * x[1] - 1), inputs
  )
  a_state, a = read_stream(empty, inputs)
  b_state, b = read_stream(empty, other)
  np.testing.assert_array_equal(a[0], b[0])
  assert not np.array_equal(a[1], b[1])
  for x, y in zip(jax.tree.leaves(a_state), jax.tree.leaves(b_state)):
    np.testing.assert_array_equal(x[0], y[0])


@pytest.mark.parametrize('name', ['default', slow('deep'), 'adaptive_q'])
def test_no_output_depends_on_a_later_token(name):
  cfg = cases.config(name)
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32, resets=False)
  empty = init_state(cfg, B, H, K)

  @jax.jit
  def outputs(streams):
    floats = inputs._replace(**streams)
    out = api.run(cfg, initial, empty, floats, implementation='scan')[1]
    return jnp.sum(out, axis=(0, 2, 3))  # per token

  streams = inputs._asdict()
  streams.pop('reset')
  jacobian = jax.jit(jax.jacrev(outputs))(streams)
  for leaf in jax.tree.leaves(jacobian):  # [L out, B, L in, ...]
    size = np.abs(leaf).sum(axis=tuple({*range(leaf.ndim)} - {0, 2}))
    assert np.all(size[np.triu_indices(L, 1)] == 0)
    assert np.all(np.tril(size).sum(axis=0) > 0)


@pytest.mark.parametrize('name', [slow('default'), 'deep', 'no_momentum'])
def test_every_initial_value_gets_an_outer_gradient(name):
  cfg = cases.config(name)
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32, resets=False)

  @jax.jit
  def loss(initial):
    out = api.run(cfg, initial, None, inputs, implementation='scan')[1]
    return jnp.sum(jnp.sin(out))

  for path, leaf in jax.tree.leaves_with_path(jax.grad(loss)(initial)):
    assert np.all(np.abs(leaf).reshape(H, -1).max(axis=1) > 1e-6), path


def test_a_document_after_a_reset_at_a_boundary_reads_as_if_alone():
  cfg = cases.config('mem_slower')
  initial = cases.initial_values(cfg, jnp.float32)
  inputs = cases.inputs(cfg, jnp.float32, length=16, resets=False)
  reset = jnp.zeros((B, 16), bool).at[:, 8].set(True)
  alone = jax.tree.map(lambda x: x[:, 8:], inputs)
  run = jax.jit(
    functools.partial(api.run, cfg, initial, None, implementation='scan')
  )
  _, want = run(alone)
  _, got = run(inputs._replace(reset=reset))
  cases.assert_close(got[:, 8:], want, 1e-5)


def test_an_unknown_implementation_is_refused():
  cfg = cases.config('default')
  inputs = cases.inputs(cfg, jnp.float32)
  with pytest.raises(ValueError, match="'cuda'.*token.*scan"):
    api.run(cfg, {}, None, inputs, implementation='cuda')


@pytest.mark.parametrize('name', ['default', 'given'])
def test_tokens_that_do_not_count_change_no_state(name):
  cfg = cases.config(name)
  initial = cases.initial_values(cfg, jnp.float32)
  empty = init_state(cfg, B, H, K)
  inputs = cases.inputs(cfg, jnp.float32)
  # what follows would forget, and would let the momentum decay
  inputs = inputs._replace(reset=inputs.reset.at[:, 6].set(True))
  run = jax.jit(functools.partial(api.run, cfg, initial, implementation='scan'))
  counted, _ = run(empty, inputs, length_B=jnp.full((B,), 6))
  cut = jax.tree.map(lambda x: x[:, :6], inputs)
  cases.assert_close(counted, run(empty, cut)[0], 1e-6)


def test_gates_that_are_not_as_the_rule_says_are_refused():
  inputs = cases.inputs(cases.config('given_rate'), jnp.float32)
  with pytest.raises(ValueError, match=r"given=\(\).*\['eta'\]"):
    api.run(cases.config('default'), {}, None, inputs)


@pytest.mark.parametrize('implementation', ['scan', 'pallas'])
@pytest.mark.parametrize('momentum', [True, False])
def test_gates_of_zero_forget_all(implementation, momentum):
  cfg = dataclasses.replace(
    cases.config('given'), momentum=momentum, chunk_mem=8, chunk_rest=8
  )
  initial = cases.initial_values(cfg, jnp.float32)
  initial = {box: initial[box] for box in cfg.boxes}
  inputs = cases.inputs(cfg, jnp.float32)
  zero = jnp.zeros(inputs.log_alpha.shape, bool)
  # in each row one, and two after one another
  zero = zero.at[:, 5].set(True).at[1, 9:11].set(True)
  inputs = inputs._replace(
    log_alpha=jnp.where(zero, -jnp.inf, inputs.log_alpha)
  )
  if momentum:
    log_beta = inputs.log_beta.at[:, 3].set(-jnp.inf)
    inputs = inputs._replace(log_beta=log_beta)

  @functools.partial(jax.jit, static_argnums=0)
  def both(implementation, initial, inputs):
    def run(initial, inputs):
      inputs = inputs._replace(reset=reset)
      _, out = api.run(
        cfg, initial, None, inputs, implementation=implementation
      )
      return jnp.sin(out).sum(), out

    reset, inputs = inputs.reset, inputs._replace(reset=None)
    grad = jax.grad(run, (0, 1), has_aux=True)
    return grad(initial, inputs)

  want = both('token', initial, inputs)
  cases.assert_close(both(implementation, initial, inputs), want, 1e-5)


def test_products_of_float32_are_not_rounded_on_any_machine():
  cfg = MemoryConfig(chunk_mem=8, chunk_rest=8, momentum=True)
  inputs = cases.inputs(cfg, jnp.float32)

  def loss(initial, query):
    here = inputs._replace(query=query)
    return jnp.sum(api.run(cfg, initial, None, here, implementation='scan')[1])

  text = (
    jax.jit(jax.grad(loss, (0, 1)))
    .lower(cases.initial_values(cfg, jnp.float32), inputs.query)
    .as_text()
  )
  products = [line for line in text.splitlines() if 'dot_general' in line]
  assert products
  assert [line for line in products if 'HIGHEST' not in line] == []
