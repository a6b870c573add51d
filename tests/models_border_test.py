"""What a model is given: what fits is read, what does not is named."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.models import language_model, model_state
from nestax.models.config import ModelConfig
from nestax.models.memory import api

B, L, V = 2, 12, 272
PLAIN = {'family': 'hope'}
LEARNS = {'cms': {'periods': (4, 8), 'blocks': 'all', 'rate': 0.1}}
ATTENDS = {'family': 'hope_attention'}


def config(*parts):
  values = {'V': V, 'D': 8, 'N': 2, 'H': 2, 'F': 24, 'dtype': 'float32'}
  values |= {'memory': {'chunk_mem': 4, 'chunk_rest': 4}}
  for part in parts:
    values |= part
  return ModelConfig.from_dict(values)


@functools.cache
def reader(cfg):
  """Reads `(state, tokens)` by a compiled program."""
  model = language_model.LanguageModel(cfg)
  made = jax.jit(model.init)(jax.random.key(0), None, ids(1, 1))['params']
  return jax.jit(functools.partial(model.apply, {'params': nn.unbox(made)}))


def traced(cfg, state, tokens_BxL, *reset):
  """What `apply` says of shapes, before anything is computed."""
  model = language_model.LanguageModel(cfg)
  shapes = nn.unbox(language_model.abstract_params(cfg))
  return jax.eval_shape(
    lambda params: model.apply({'params': params}, state, tokens_BxL, *reset),
    shapes,
  )


def refuses(*words, error=ValueError):
  """That an error of this type says all of these words."""
  return pytest.raises(error, match='(?s)' + '.*'.join(words))


def ids(*shape, dtype=jnp.int32):
  return jnp.ones(shape or (B, L), dtype)


def fresh(*parts, batch=B, length=L):
  return model_state.init_state(config(*parts), batch, length)


both = pytest.mark.parametrize('part', [{}, LEARNS], ids=['plain', 'learns'])


@both
@pytest.mark.parametrize(
  'tokens_BxL,words',
  [
    (ids(L), [r'shape \(12,\)', r'\[B, L\]']),
    (ids(B, L, 1), [r'shape \(2, 12, 1\)', r'\[B, L\]']),
    (ids(dtype=float), ['float32', 'whole numbers']),
    (ids(dtype=bool), ['bool', 'whole numbers']),
    ([[1, 2], [3, 4]], ['a list', 'array']),
    (ids().at[1, 3].set(V), ['token id 272', 'V=272', 'from 0 to 271']),
    (ids().at[1, 3].set(-1), ['token id -1', 'from 0 to 271']),
    (np.full((B, L), 300), ['token id 300']),
  ],
)
def test_tokens_that_are_none_are_refused(part, tokens_BxL, words):
  with refuses(*words):
    traced(config(part), None, tokens_BxL)


def test_a_state_in_the_place_of_tokens_is_told():
  with refuses('tokens are a ModelState', 'first argument'):
    traced(config(), ids(), fresh())


@both
@pytest.mark.parametrize(
  'reset_BxL',
  [
    np.zeros((B, L - 1), bool),
    np.zeros((1, L), bool),
    np.zeros((L,), bool),
    np.zeros((B, L), np.int32),
    np.zeros((B, L), np.float32),
    [[False] * L] * B,
  ],
)
def test_starts_of_documents_that_do_not_fit_are_refused(part, reset_BxL):
  with refuses('reset', r'\(2, 12\)', 'bool'):
    traced(config(part), fresh(part), ids(), reset_BxL)


OTHERS = {
  'plain for one that learns': (PLAIN, LEARNS, r'it has no levels\.'),
  'one that learns for plain': (LEARNS, {}, r'the model has no levels\.'),
  'mixer': (ATTENDS, {}, r'it has no blocks\.mixer\.memory'),
  'blocks': ({'N': 3}, {}, r'shape \(3, 2, .*not \(2, 2'),
  'heads': ({'H': 1}, {}, r'shape \(2, 2, 1, .*not \(2, 2, 2'),
  'smallest period': (
    {'cms': LEARNS['cms'] | {'periods': (2, 8)}},
    LEARNS,
    r'levels\.held.* \(2, 2, 8\) .*not \(2, 4, 8\)',
  ),
  'levels': (
    {'cms': LEARNS['cms'] | {'periods': (4,)}}, LEARNS, 'no levels.levels.1'
  ),
  'momentum': (
    {'cms': LEARNS['cms'] | {'optimizer': 'muon'}}, LEARNS, 'no .*moment'
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', OTHERS)
def test_the_state_of_another_model_is_refused(name):
  given, taken, words = OTHERS[name]
  with refuses('a state of another model', words, 'init_state'):
    traced(config(taken), fresh(given), ids())


def test_a_state_of_another_type_is_refused():
  state = fresh()
  with refuses('it is a dict'):
    traced(config(), state._asdict(), ids())
  with refuses('it is a tuple'):
    traced(config(), tuple(state), ids())
  half = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state
  )
  with refuses('bfloat16, not', 'float32'):
    traced(config(), half, ids())


@pytest.mark.parametrize('scope', ['shared', 'owner'])
def test_a_state_may_leave_slots_to_the_parameters(scope):
  part = {'cms': LEARNS['cms'] | {'slots': 2, 'rank': 2, 'scope': scope}}
  state = fresh(part)
  assert (state.owned is None) == (scope == 'shared')
  for given in (state, state._replace(owned=None)):
    traced(config(part), given, ids())
  with refuses(r'the model has no owned\.0'):
    traced(
      config(LEARNS),
      fresh(part | {'cms': part['cms'] | {'scope': 'owner'}}),
      ids(),
    )


@pytest.mark.parametrize('how', ['in force', 'of the tokens'])
def test_a_mesh_of_explicit_axes_is_refused(how):
  mesh = jax.make_mesh((2,), ('data',))
  put = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  words = "axes ('data',) of the mesh are Explicit", 'AxisType.Auto,) * 1'
  with refuses(*map(re.escape, words)):
    if how == 'in force':
      with jax.set_mesh(mesh):
        traced(config(), None, ids())
    else:
      traced(config(), None, jax.device_put(ids(), put))


@pytest.mark.parametrize(
  'names,says', [(('x', 'y'), True), (('x', 'data'), False)]
)
def test_a_mesh_of_other_names_is_told_once(names, says, caplog):
  kinds = (jax.sharding.AxisType.Auto,) * 2
  api.say_once.cache_clear()
  with jax.set_mesh(jax.make_mesh((2, 2), names, axis_types=kinds)):
    for _ in range(2):
      traced(config(), None, ids())
  words = 'no axis of the mesh, x, y, is one of data, fsdp, tensor, sequence'
  assert caplog.text.count(words) == says


@both
@pytest.mark.parametrize('batch', [1, 3])
def test_a_state_of_another_batch_is_refused(part, batch):
  with refuses(f'a state of {batch} sequences, and tokens of 2'):
    traced(config(part), fresh(part, batch=batch), ids())


@pytest.mark.parametrize('length', [1, L, 40])
def test_caches_may_be_of_any_length(length):
  state, _ = traced(config(ATTENDS), fresh(ATTENDS, length=length), ids())
  assert state.blocks.mixer.key_BxSxGxK.shape[2] == length


def test_arrays_of_numpy_are_a_state_too():
  state = jax.tree.map(np.asarray, fresh(LEARNS))
  traced(config(LEARNS), state, np.ones((B, L), np.int64))


@both
def test_an_id_out_of_range_gives_nan_where_it_cannot_be_looked_at(part):
  for wrong in (-1, V):
    _, logits = reader(config(part))(None, ids().at[1, 8].set(wrong))
    logits = np.asarray(logits)
    assert np.isfinite(logits[0]).all() and np.isfinite(logits[1, :8]).all()
    assert np.isnan(logits[1, 8]).all()


def test_bytes_are_read_as_the_ids_that_they_are():
  # levels of a vocabulary beyond 255 must not take one byte for two ids
  read = reader(config(LEARNS))
  tokens_BxL = np.arange(B * L, dtype=np.uint8).reshape(B, L)
  _, want = read(None, tokens_BxL.astype(np.int32))
  np.testing.assert_array_equal(read(None, tokens_BxL)[1], want)


@pytest.mark.parametrize('state', [False, True], ids=['fresh', 'goes on'])
@both
def test_no_tokens_change_nothing(part, state):
  given = fresh(part) if state else None
  got, logits = reader(config(part))(given, ids(B, 0))
  assert logits.shape == (B, 0, V)
  jax.tree.map(np.testing.assert_array_equal, got, given)


def test_parameters_in_their_collection_are_told_from_bare_ones():
  cfg, state = config(LEARNS), fresh(LEARNS)
  params = nn.unbox(language_model.abstract_params(cfg))
  for ask in (
    lambda x: language_model.flush(cfg, x, state),
    lambda x: language_model.inner_rates(cfg, x),
  ):
    jax.eval_shape(ask, params)
    with refuses("{'params': ...}", 'the tree in it'):
      jax.eval_shape(ask, {'params': params})
