"""Logical axes on a mesh: what is split, what stays whole, same numbers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nestax.models import axes, language_model, layers
from nestax.models.config import FAMILIES, ModelConfig
from nestax.models.families import WINDOWED

B, L = 8, 6
SIZES = {'data': 2, 'fsdp': 2, 'tensor': 2}


def spec(names, shape, sizes=None):
  got = axes.partition_spec(names, shape, sizes or SIZES)
  single = lambda x: isinstance(x, tuple) and len(x) == 1  # noqa: E731
  return tuple(x[0] if single(x) else x for x in got)


def test_an_axis_goes_where_its_rule_says():
  assert spec(('embed', 'mlp'), (6, 8)) == ('fsdp', 'tensor')
  assert spec(('batch', 'length'), (8, 6)) == (('data', 'fsdp'), None)
  assert spec(('layers', None, 'memory'), (4, 4, 4)) == (None, None, None)


def test_a_mesh_axis_that_is_missing_or_single_splits_nothing():
  assert spec(('embed', 'mlp'), (8, 8), {'fsdp': 4}) == ('fsdp', None)
  assert spec(('embed', 'mlp'), (8, 8), {'fsdp': 1, 'tensor': 4}) == (
    None,
    'tensor',
  )


def test_a_dimension_that_does_not_divide_stays_whole():
  assert spec(('embed', 'mlp'), (7, 8)) == (None, 'tensor')
  assert spec(('embed', 'heads'), (8, 6), {'fsdp': 2, 'tensor': 4}) == (
    'fsdp',
    None,
  )
  # rows that only the first of two mesh axes divides lie over that one
  assert spec(('batch',), (2,)) == ('data',)
  assert spec(('batch',), (6,), {'data': 4, 'fsdp': 3}) == ('fsdp',)


def test_no_mesh_axis_is_used_for_two_dimensions():
  assert spec(('heads', 'mlp'), (4, 4)) == ('tensor', None)
  assert spec(('batch', 'embed'), (4, 4)) == (('data', 'fsdp'), None)
  # the second takes what the first could not
  assert spec(('heads', 'mlp'), (3, 4)) == (None, 'tensor')


def test_an_axis_without_a_rule_is_refused_by_name():
  with pytest.raises(ValueError, match="'colour'.*models/axes.py"):
    spec(('embed', 'colour'), (4, 4))


def test_as_many_names_as_dimensions_are_wanted():
  with pytest.raises(ValueError, match='zip'):
    spec(('embed',), (4, 4))


def mesh(sizes=SIZES):
  kinds = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def test_rows_lie_over_data_and_fsdp_and_lengths_over_sequence():
  rows = ('data', 'fsdp')
  assert axes.batch_sharding(mesh()).spec == PartitionSpec(rows, None)
  assert axes.batch_sharding(mesh(), 1).spec == PartitionSpec(rows)
  long = jax.make_mesh(
    (2, 4), ('data', 'sequence'), axis_types=(AxisType.Auto,) * 2
  )
  want = PartitionSpec('data', 'sequence')
  assert axes.batch_sharding(long).spec == want


def test_what_carries_no_names_is_whole_on_every_device():
  (got,) = jax.tree.leaves(axes.shardings(mesh(), {'count': np.zeros(8)}))
  assert got == NamedSharding(mesh(), PartitionSpec())


def test_without_a_mesh_an_activation_is_left_alone():
  x = np.ones((4, 4), np.float32)
  assert axes.constrain(x, 'batch', 'embed') is x


def test_under_a_mesh_an_activation_is_laid_on_it():
  x = np.ones((4, 6), np.float32)
  with jax.set_mesh(mesh()):
    y = jax.jit(lambda x: axes.constrain(x, 'batch', 'mlp'))(x)
  assert y.sharding.shard_shape(y.shape) == (1, 3)


def model(family):
  cfg = ModelConfig.from_dict(
    {
      'family': family,
      'V': 32,
      'D': 16,
      'N': 2,
      'H': 4,
      'F': 24,
      'dtype': 'float32',
      'memory': {'chunk_mem': 4, 'chunk_rest': 4},
      'window': 3 * (family in WINDOWED),
    }
  )
  return language_model.LanguageModel(cfg), language_model.abstract_params(cfg)


def random_like(boxed):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32),
    nn.unbox(boxed),
  )


@pytest.mark.parametrize(
  'family',
  [
    *FAMILIES[:3],
    *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[3:]),
  ],
)
def test_a_model_on_eight_devices_gives_the_logits_of_one(family):
  lm, boxed = model(family)
  params = random_like(boxed)
  tokens = np.random.default_rng(1).integers(0, 32, (B, L), np.int32)
  run = lambda p, t: lm.apply({'params': p}, None, t)[1]  # noqa: E731
  want = jax.jit(run)(params, tokens)
  assert len(want.sharding.device_set) == 1
  eight = mesh()
  layout = axes.shardings(eight, boxed)
  assert jax.tree.structure(layout) == jax.tree.structure(params)
  placed = jax.device_put(params, layout)
  rows = jax.device_put(tokens, axes.batch_sharding(eight))
  with jax.set_mesh(eight):
    got = jax.jit(run)(placed, rows)
  # 8 rows over data and fsdp, the vocabulary over tensor
  assert got.sharding.shard_shape(got.shape) == (B // 4, L, 16)
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_no_large_parameter_is_whole_on_any_device(family):
  _, boxed = model(family)
  layout = axes.shardings(mesh(), boxed)
  for (path, leaf), sharding in zip(
    jax.tree.leaves_with_path(nn.unbox(boxed)), jax.tree.leaves(layout)
  ):
    part = np.prod(sharding.shard_shape(leaf.shape))
    name = jax.tree_util.keystr(path)
    ways = 2 if 'conv' in name else 4  # its heads alone
    if leaf.size > 128:
      assert part * ways == leaf.size, (name, leaf.shape, sharding.spec)


@pytest.mark.parametrize(
  'names, whole',
  [(('embed', 'mlp'), (8, 8)), (('mlp', 'embed'), (4, 16))],
  ids=['wide', 'back'],
)
def test_a_product_reads_weights_whole_along_fsdp(names, whole):
  """And its gradient is that of one device, and never whole."""
  rng = np.random.default_rng(0)
  w, other = rng.normal(size=(2, 8, 16)).astype(np.float32)
  rows = rng.normal(size=(B, 8)).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=2)
  def run(w, rows, mesh):
    def total(w):
      kept = axes.gathered(w, *names) if mesh else w
      return (jnp.tanh(rows @ kept) ** 2).sum() + (kept * other).sum(), kept

    return jax.grad(total, has_aux=True)(w)

  want, laid = run(w, rows, None), mesh()
  rows = jax.device_put(rows, axes.batch_sharding(laid))
  with jax.set_mesh(laid):
    got = run(w, rows, laid)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), got, want
  )
  grad, kept = (x.sharding.shard_shape(w.shape) for x in got)
  assert kept == whole and grad == (4, 8)


@pytest.mark.parametrize('V', [24, 96], ids=['by shard', 'left alone'])
def test_looked_up_on_a_mesh_as_on_one_device(V):
  rng = np.random.default_rng(0)
  embed = layers.Embedding(V, 8, np.float32)
  table = rng.normal(size=(V, 8)).astype(np.float32)
  other = rng.normal(size=(B, L, 8)).astype(np.float32)
  tokens = rng.integers(0, V, (B, L)).astype(np.int32)  # 48 of them

  @functools.partial(jax.jit, static_argnums=2)
  def run(table, tokens, mesh):
    def total(table):
      x_BxLxD = embed.apply({'params': {'embedding': table}}, tokens)
      return (x_BxLxD * x_BxLxD * other).sum(), x_BxLxD

    return jax.grad(total, has_aux=True)(table)

  want = run(table, tokens, None)
  laid = mesh()
  whole = NamedSharding(laid, PartitionSpec('tensor', 'fsdp'))
  with jax.set_mesh(laid):
    got = run(jax.device_put(table, whole), tokens, laid)
    text = run.lower(table, tokens, laid).as_text()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, want
  )
  assert ('manual_computation' in text or 'shard_map' in text) == (V == 24)
  if V == 24:
    # the gradient is added up by shard, and only parts of it along data
    assert got[0].sharding.shard_shape(table.shape) == (V // 2, 8 // 2)
    assert 'reduce_scatter' in text


@pytest.mark.parametrize('sizes', [{'data': 8, 'tensor': 1}, SIZES], ids=str)
def test_by_shard_sums_gradients_over_devices_that_share_alone(sizes):
  laid = mesh(sizes)
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(2, 8, 4)).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=2)
  def run(x, w, mesh):
    def total(x, w):
      ours = axes.by_shard(
        lambda x, w: jnp.tanh(x * w.sum(0, keepdims=True)),
        {'batch': 8, 'heads': 4},
        (('batch', 'heads'), (None, 'heads')),
        ('batch', 'heads'),
      )
      return ours(x, w).sum()

    return jax.grad(total, (0, 1))(x, w)

  want = run(x, w, None)
  with jax.set_mesh(laid):
    got = run(x, w, laid)
    text = run.lower(x, w, laid).as_text()
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, want
  )
  # of w alone, over data and fsdp
  assert text.count('all_reduce') == 1


def test_the_platform_is_the_mesh_s_then_the_default_device_s(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert axes.platform() == 'gpu'
  with jax.default_device(jax.devices('cpu')[0]):
    assert axes.platform() == 'cpu'
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert axes.platform() == 'cpu'

    @jax.shard_map(
      in_specs=PartitionSpec('data'), out_specs=PartitionSpec('data')
    )
    def inside(x):
      assert axes.platform() == 'cpu'
      return x

    inside(jnp.zeros(8))
