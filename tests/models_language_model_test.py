"""Every family as a language model: streams, causality, first loss, limits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from nestax.models import axes, language_model, model_state
from nestax.models.config import ModelConfig
from nestax.models.memory.types import MemoryConfig

B, L = 2, 24
FAMILIES = {
  'transformer': {'family': 'transformer'},
  'windowed': {'family': 'transformer', 'window': 5, 'G': 1},
  'hope': {'family': 'hope'},
  'hope_attention': {'family': 'hope_attention', 'tied': False},
  'deltanet': {'family': 'deltanet'},
  'gated_deltanet': {'family': 'gated_deltanet'},
  'retnet': {'family': 'retnet'},
  'mamba2': {'family': 'mamba2'},
  'titans': {'family': 'titans'},
  'titans_mac': {'family': 'titans_mac', 'persistent': 2},
  'titans_mag': {'family': 'titans_mag', 'persistent': 2, 'window': 5},
  'titans_mal': {'family': 'titans_mal', 'persistent': 2, 'window': 5, 'G': 1},
  'ttt_linear': {'family': 'ttt_linear'},
  'ttt_mlp': {'family': 'ttt_mlp'},
  'samba': {'family': 'samba', 'window': 5},
}
# One of each kind of code; the others of their kind are slow tests.
QUICK = ('transformer', 'windowed', 'hope', 'hope_attention', 'retnet')


def slow(name, *values, quick=QUICK):
  marks = () if name in quick else pytest.mark.slow
  return pytest.param(name, *values, marks=marks)


# Windows are seen in streams below, and in models_attention_test.py.
every_family = pytest.mark.parametrize(
  'name',
  [slow(name, quick={*QUICK} - {'windowed'}) for name in FAMILIES],
)


@functools.cache
def build(name, **options):
  values = {'V': 64, 'D': 16, 'N': 2, 'H': 2, 'F': 24, 'dtype': 'float32'}
  rest = 4 if FAMILIES[name]['family'] == 'hope' else 8
  values |= {'memory': {'chunk_mem': 8, 'chunk_rest': rest}}
  options = {k: dict(v) if k == 'cms' else v for k, v in options.items()}
  cfg = ModelConfig.from_dict(values | FAMILIES[name] | options)
  model = language_model.LanguageModel(cfg)
  boxed = jax.jit(model.init)(jax.random.key(0), None, tokens()[:, :1])
  return model, boxed['params'], jax.jit(model.apply)


def tokens(seed=0):
  return jax.random.randint(jax.random.key(seed), (B, L), 0, 64, jnp.int32)


def resets():
  return jnp.zeros((B, L), bool).at[0, 7].set(True).at[1, 16].set(True)


def apply(name, state, *inputs):
  _, boxed, run = build(name)
  return run({'params': nn.unbox(boxed)}, state, *inputs)


def fresh(name):
  return model_state.init_state(build(name)[0].cfg, B, length=L)


def close(a, b, atol=1e-5):
  np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize(
  'name,reset',
  [slow(name, resets(), quick=(*QUICK, 'titans_mac')) for name in FAMILIES]
  + [slow(name, None, quick=('transformer',)) for name in QUICK[:4]],
)
def test_a_stream_in_pieces_gives_the_logits_of_one_read(name, reset):
  _, want = apply(name, None, tokens(), reset)
  want_state, again = apply(name, fresh(name), tokens(), reset)
  close(again, want)
  state, at, out = fresh(name), 0, []
  for size in [5, 5, 1, 1, 1, 1, 5, 5]:  # over the bounds of chunks
    piece = slice(at, at + size)
    reset_piece = None if reset is None else reset[:, piece]
    state, logits = apply(name, state, tokens()[:, piece], reset_piece)
    out.append(logits)
    at += size
  close(jnp.concatenate(out, axis=1), want)
  jax.tree.map(close, state, want_state)


def test_a_stream_longer_than_its_cache_does_not_depend_on_its_cuts():
  cfg = build('transformer')[0].cfg

  def read(*cuts):
    state, out = model_state.init_state(cfg, B, length=10), []
    for start, stop in zip((0, *cuts), (*cuts, L)):
      state, logits = apply('transformer', state, tokens()[:, start:stop])
      out.append(logits)
    return jnp.concatenate(out, axis=1)

  close(read(8, 16), read(16))
  close(read(1, 9, 17), read(16))
  with pytest.raises(ValueError, match='length=0'):
    model_state.init_state(cfg, B, length=0)


@every_family
def test_a_reset_forgets(name):
  # at a boundary of both chunks, where a document begins as if alone
  reset = jnp.zeros((B, L), bool).at[:, 8].set(True)
  _, got = apply(name, None, tokens(), reset)
  # the document first: what follows it changes nothing that is read of it
  _, want = apply(name, None, jnp.roll(tokens(), -8, axis=1))
  close(got[:, 8:], want[:, :-8], 3e-5)
  _, carried = apply(name, None, tokens())
  assert np.abs(carried[:, 8:] - want[:, :-8]).max() > 1e-3


@every_family
def test_sequences_are_independent_to_the_bit(name):
  changed = tokens().at[1].set(tokens(seed=1)[1])
  state_a, a = apply(name, fresh(name), tokens(), resets())
  state_b, b = apply(name, fresh(name), changed, resets())
  np.testing.assert_array_equal(a[0], b[0])
  assert np.abs(a[1] - b[1]).max() > 0
  for x, y in zip(jax.tree.leaves(state_a), jax.tree.leaves(state_b)):
    np.testing.assert_array_equal(x[:, 0], y[:, 0])


@every_family
def test_no_token_reads_a_later_one(name):
  _, want = apply(name, None, tokens())
  for at in (5, 8, 17):
    _, got = apply(name, None, tokens().at[:, at].set(1 + at))
    np.testing.assert_array_equal(got[:, :at], want[:, :at])
    assert np.abs(got[:, at:] - want[:, at:]).max() > 0


@every_family
def test_first_loss_is_that_of_guessing(name):
  _, logits = apply(name, None, tokens())
  log_p = jax.nn.log_softmax(logits[:, :-1])
  loss = -jnp.mean(jnp.take_along_axis(log_p, tokens()[:, 1:, None], axis=-1))
  np.testing.assert_allclose(loss, np.log(64), rtol=0.05)


@every_family
def test_every_parameter_gets_a_gradient(name):
  model, boxed, _ = build(name)

  @jax.jit
  def loss(params):
    _, logits = model.apply({'params': params}, None, tokens())
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, tokens()[:, 1:, None], axis=-1))

  grads = jax.grad(loss)(nn.unbox(boxed))
  for path, leaf in jax.tree.leaves_with_path(grads):
    assert np.all(np.isfinite(leaf)), path
    per_layer = leaf if path[0].key == 'blocks' else leaf[None]
    per_layer = np.abs(per_layer).reshape(len(per_layer), -1).max(axis=1)
    assert np.all(per_layer > 1e-9), (jax.tree_util.keystr(path), per_layer)


@functools.cache
def gradients_and_jaxpr(remat):
  model, boxed, _ = build('transformer', remat=remat)

  @jax.jit
  def loss(params):
    return jnp.sum(jnp.sin(model.apply({'params': params}, None, tokens())[1]))

  return jax.grad(loss)(nn.unbox(boxed)), str(
    jax.make_jaxpr(jax.grad(loss))(nn.unbox(boxed))
  )


@pytest.mark.parametrize('policy', ['kernels', 'dots', 'full', 'offload'])
def test_remat_changes_no_value(policy):
  want, plain = gradients_and_jaxpr('none')
  got, wrapped = gradients_and_jaxpr(policy)
  assert 'remat' in wrapped and 'remat' not in plain
  # a block's input goes to the host and comes back
  assert ('<host>' in wrapped) == (policy == 'offload')
  jax.tree.map(lambda a, b: close(a, b, 1e-4), got, want)


@pytest.mark.parametrize(
  'name,remat',
  [
    ('transformer', 'dots'),
    pytest.param('hope', 'none', marks=pytest.mark.slow),
  ],
)
def test_unrolled_blocks_change_no_value(name, remat):
  def grads(unroll):
    model, boxed, _ = build(name, remat=remat, unroll=unroll, N=3)

    @jax.jit
    def grad(params):
      return jax.grad(
        lambda p: jnp.sin(model.apply({'params': p}, None, tokens())[1]).sum()
      )(params)

    text = grad.lower(nn.unbox(boxed)).as_text()
    return lambda: grad(nn.unbox(boxed)), text.count('stablehlo.while')

  (want, loops), (two, some), (_, none) = map(grads, (1, 2, 9))
  if name == 'transformer':  # the others have loops of their own
    assert none <= loops - 2 and none < some, 'forward and back'
  jax.tree.map(lambda a, b: close(a, b, 1e-4), two(), want())


def test_kernels_results_are_kept_if_asked_for():
  def kernels(remat):
    memory = {
      'chunk_mem': 8, 'chunk_rest': 8, 'implementation': 'pallas'
    }  # fmt: skip
    model = language_model.LanguageModel(
      ModelConfig(V=64, D=16, F=24, remat=remat, memory=MemoryConfig(**memory))
    )
    params = nn.unbox(language_model.abstract(model))

    def loss(params):
      return model.apply({'params': params}, None, tokens())[1].sum()

    return str(jax.make_jaxpr(jax.grad(loss))(params)).count('pallas_call')

  assert kernels('none') == kernels('kernels') < kernels('dots')


def test_one_level_that_never_learns_is_the_transformers_mlp():
  hope, boxed, _ = build(
    'hope_attention', cms=(('periods', (128,)),), tied=True
  )
  plain, want_boxed, _ = build('transformer')
  params = nn.unbox(boxed)
  assert jax.tree.structure(params) == jax.tree.structure(nn.unbox(want_boxed))
  _, got = hope.apply({'params': params}, None, tokens())
  _, want = plain.apply({'params': params}, None, tokens())
  np.testing.assert_array_equal(got, want)


@every_family
def test_every_parameter_names_the_axis_of_each_dimension(name):
  _, boxed, _ = build(name)
  is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
  for path, leaf in jax.tree.leaves_with_path(boxed, is_leaf=is_box):
    assert is_box(leaf), path
    assert len(leaf.names) == leaf.value.ndim, path
    assert all(axis in axes.RULES for axis in leaf.names), (path, leaf.names)


def test_flops_grow_with_length_only_for_attention():
  hope, plain = build('hope')[0].cfg, build('transformer')[0].cfg
  count = language_model.flops_per_token
  assert count(hope, 4096) == count(hope, 65_536)
  assert count(plain, 65_536) > 2 * count(plain, 4096)
  matmuls = 2 * language_model.parameter_count(plain)
  assert 1 < count(plain, 4) / matmuls < 1.2


LEARNS = (('periods', (4, 8)), ('blocks', 'all'), ('rate', 0.1))


@pytest.mark.parametrize(
  'name,options', [('hope', {}), ('hope_attention', {'cms': LEARNS})]
)
@pytest.mark.parametrize('goes_on', [False, True], ids=['fresh', 'goes on'])
def test_a_batch_may_be_a_symbol_where_it_is_exported(name, options, goes_on):
  model, boxed, apply = build(name, N=1, **options)
  (rows,) = export.symbolic_shape('rows', constraints=('rows >= 1',))

  def open_to(names, x):
    axis = names.index('batch')
    shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
    return jax.ShapeDtypeStruct(shape, x.dtype)

  state = shapes = None
  if goes_on:
    state = model_state.init_state(model.cfg, B, L)
    shapes = axes.map_names(open_to, model_state.state_axes(state), state)
  params = {'params': nn.unbox(boxed)}
  ids = jax.ShapeDtypeStruct((rows, L), jnp.int32)
  made = export.export(apply)(params, shapes, ids)
  assert made.out_avals[-1].shape == (rows, L, 64)
  _, want = apply(params, state, tokens())
  _, got = made.call(params, state, tokens())
  np.testing.assert_allclose(got, want, atol=1e-5)
