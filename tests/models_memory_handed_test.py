"""Arrays that do not fit a rule are refused by name, and may be in shards."""

import jax
import jax.numpy as jnp
import memory_cases as cases
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nestax.models.memory import api, types

B, L, H, K = cases.B, cases.L, cases.H, cases.K
BIG = jnp.zeros((B, L, H, K))
RULES = {
  'default': cases.config('default'),
  'given': cases.config('given'),
  'no momentum': cases.config('no_momentum'),
}


def refuses(*words):
  return pytest.raises(ValueError, match='(?s)' + '.*'.join(words))


def given(name):
  cfg = RULES[name]
  inputs = cases.inputs(cfg, jnp.float32)
  return cfg, cases.initial_values(cfg, jnp.float32), inputs


@pytest.mark.parametrize('implementation', ['token', 'scan'])
@pytest.mark.parametrize(
  'rule,name,value,words',
  [
    ('default', 'query', BIG[0], [r'query .*\(13, 2, 4\)', r'\[B, L, H, K\]']),
    ('default', 'query', BIG[:, :0], ['query', 'L at least 1']),
    ('default', 'key', BIG[:, 1:], [r'key .*\(2, 12, 2, 4\)', '2, 13, 2, 4']),
    ('default', 'key', BIG[:1], [r'key .*\(1, 13, 2, 4\)']),
    ('default', 'value', BIG[..., :2], [r'value .*\(2, 13, 2, 2\)']),
    ('default', 'value', BIG > 0, ['value .*bool', 'floats']),
    ('default', 'reset', BIG[..., 0] > 0, [r'reset .*\(2, 13, 2\)']),
    ('default', 'reset', BIG[:, :, 0, 0], ['reset .*float32', 'bool']),
    ('default', 'log_beta', None, ['momentum=True', 'no log_beta']),
    ('no momentum', 'log_beta', BIG[..., 0], ['momentum=False', 'a log_beta']),
    ('given', 'eta', BIG[..., :1], [r'eta .*\(2, 13, 2, 1\)', r'\[B, L, H\]']),
    ('given', 'log_alpha', BIG[:, :1, :, 0], [r'log_alpha .*\(2, 1, 2\)']),
  ],
)
def test_inputs_that_do_not_fit_are_refused(
  implementation, rule, name, value, words
):
  cfg, initial, inputs = given(rule)
  inputs = inputs._replace(**{name: value})
  with refuses(*words):
    api.run(cfg, initial, None, inputs, implementation=implementation)


@pytest.mark.parametrize(
  'length_B', [[3, 4], jnp.array(3), jnp.ones((3,), int)]
)
def test_lengths_are_an_array_of_one_a_row(length_B):
  cfg, initial, inputs = given('default')
  with refuses('length_B', r'\[B\]', r'\(2,\)'):
    api.run(cfg, initial, None, inputs, length_B=length_B)


@pytest.mark.parametrize('implementation', ['token', 'scan'])
@pytest.mark.parametrize(
  'change,words',
  [
    (lambda x: x | {'mem': {}}, ["no \\['mem'\\]\\['kernel'\\]"]),
    (lambda x: {k: v for k, v in x.items() if k != 'eta'}, ["no \\['eta'\\]"]),
    (
      lambda x: x | {'k': {'kernel': jnp.zeros((H, K, 3))}},
      [r"\['k'\]\['kernel'\] .*\(2, 4, 3\)|4, 3", r'\(4, 4\)'],
    ),
    (lambda x: jax.tree.map(lambda y: y[:1], x), ['initial', 'H=2 heads']),
    (lambda x: x | {'mem': {'kernel': jnp.zeros(())}}, ['H=2 heads']),
  ],
  ids=['no mem', 'no gate', 'width', 'heads', 'rank'],
)
def test_initial_values_that_do_not_fit_are_refused(
  implementation, change, words
):
  cfg, initial, inputs = given('default')
  with refuses(*words):
    api.run(cfg, change(initial), None, inputs, implementation=implementation)


@pytest.mark.parametrize('implementation', ['token', 'scan'])
@pytest.mark.parametrize(
  'rule,sizes,dtype,words',
  [
    ('default', (3, H, K), jnp.float32, [r'\(3, 2,', r'\(2, 2,']),
    ('default', (B, 1, K), jnp.float32, [r'\(2, 1,', r'\(2, 2,']),
    ('default', (B, H, K), jnp.bfloat16, ['bfloat16', 'float32 are wanted']),
    ('no momentum', (B, H, K), jnp.float32, ['has no .momentum']),
  ],
)
def test_states_that_do_not_fit_are_refused(
  implementation, rule, sizes, dtype, words
):
  cfg, initial, inputs = given('default')
  state = types.init_state(RULES[rule], *sizes, dtype)
  with refuses(*words, 'init_state'):
    api.run(cfg, initial, state, inputs, implementation=implementation)


def test_a_state_with_more_than_the_rule_has_is_refused():
  cfg, initial, inputs = given('no momentum')
  state = types.init_state(RULES['default'], B, H, K)
  with refuses('a state of this rule has no .momentum'):
    api.run(cfg, initial, state, inputs)


@pytest.mark.parametrize('implementation', ['token', 'scan'])
def test_fresh_sequences_may_be_shared_out_by_shard_map(implementation):
  # what varies is checked, as is shard_map's default
  cfg, initial, inputs = given('default')
  kinds = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 2), ('rows', 'heads'), axis_types=kinds)
  rows = PartitionSpec('rows', None, 'heads')
  specs = jax.tree.map(lambda x: PartitionSpec(*rows[: x.ndim]), inputs)

  def run(initial, inputs):
    return api.run(cfg, initial, None, inputs, implementation=implementation)[1]

  def loss(run):
    return jax.jit(jax.value_and_grad(lambda *x: (run(*x) ** 2).sum()))

  apart = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(PartitionSpec('heads'), specs),
    out_specs=rows,
  )
  want, got = (loss(f)(initial, inputs) for f in (run, apart))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want
  )
