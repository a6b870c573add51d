"""Singular values go to 1; stacks, trees and meshes change nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nestax.optim import coefficients, matrices, newton_schulz, spectrum

Numbers = matrices.MuonDimensionNumbers
F32 = jnp.float32


def gaussian(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), F32)


@pytest.mark.parametrize('shape', [(64, 256), (256, 64), (512, 128)])
@pytest.mark.parametrize('seed', [0, 1])
def test_gaussian_matrices_end_within_muons_bounds(shape, seed):
  low, high = spectrum.extremes(
    gaussian(*shape, seed=seed), coefficients.quintic(5)
  )
  assert 0.65 <= low and high <= 1.25


@pytest.mark.parametrize('shape', [(256, 64), (128, 128)])
@pytest.mark.parametrize('condition', [1, 30, 1e3])
def test_condition_1e3_ends_near_one_in_8_polar_express_steps(shape, condition):
  x = spectrum.with_condition(*shape, condition)
  low, high = spectrum.extremes(x, coefficients.polar_express(8))
  assert 0.9 <= low and high <= 1.1


def test_condition_1e3_needs_7_steps_at_4_to_1():
  x = spectrum.with_condition(256, 64, 1e3)
  low, high = spectrum.extremes(x, coefficients.polar_express(7))
  assert 0.9 <= low and high <= 1.1
  assert spectrum.extremes(x, coefficients.polar_express(6))[0] < 0.9


def test_the_table_has_a_row_for_each_schedule():
  text = spectrum.table(
    {'five': coefficients.quintic(5)}, conditions=(1, 10), shape=(16, 8)
  )
  assert text.splitlines()[0] == '| coefficients | Gaussian | 1 | 10 |'
  assert text.splitlines()[2].startswith('| five | ')


def test_singular_vectors_are_kept():
  x = gaussian(16, 8)
  u, _, vt = np.linalg.svd(x, full_matrices=False)
  y = newton_schulz.orthogonalize(x, coefficients.polar_express(10), F32)
  np.testing.assert_allclose(y, u @ vt, atol=1e-3)


def test_scale_does_not_matter():
  x = gaussian(16, 8)
  y = newton_schulz.orthogonalize(x)
  for scale in (2.0**20, 2.0**-20):
    z = newton_schulz.orthogonalize(scale * x)
    np.testing.assert_allclose(y, z, atol=2e-2)


@pytest.mark.parametrize('largest', [1e18, 1e25, 3e38])
def test_squares_beyond_float32_do_not_overflow(largest):
  x = gaussian(16, 8)
  y = newton_schulz.orthogonalize(x, dtype=F32)
  huge = x * (largest / jnp.abs(x).max())
  z = newton_schulz.orthogonalize(huge, dtype=F32)
  np.testing.assert_allclose(z, y, atol=1e-3)
  one = newton_schulz.orthogonalize(jnp.full((1, 1), largest), dtype=F32)
  np.testing.assert_allclose(one, 0.7, atol=0.2)


def test_what_is_not_finite_is_not_hidden():
  for bad in (jnp.inf, jnp.nan):
    y = newton_schulz.orthogonalize(gaussian(4, 8).at[1, 2].set(bad))
    assert jnp.isnan(y).any()


def test_zero_stays_zero():
  assert not jnp.any(newton_schulz.orthogonalize(jnp.zeros((4, 8))))


@pytest.mark.parametrize('shape', [(0, 4, 8), (3, 0, 8), (3, 4, 0)])
def test_no_elements_make_no_elements(shape):
  tree = {'none': jnp.zeros(shape), 'some': gaussian(2, 4, 8)}
  got = newton_schulz.orthogonalize_tree(tree)
  assert got['none'].shape == shape
  assert jnp.isfinite(got['some']).all()


def test_a_stack_is_its_matrices_one_by_one():
  x = gaussian(2, 3, 8, 4)
  whole = newton_schulz.orthogonalize(x, dtype=F32)
  for i in np.ndindex(2, 3):
    one = newton_schulz.orthogonalize(x[i], dtype=F32)
    np.testing.assert_allclose(whole[i], one, atol=1e-5)


@pytest.mark.parametrize('shape', [(16, 8), (8, 16), (8, 8)])
def test_equals_optax_to_rounding(shape):
  x = gaussian(*shape)
  triple = jnp.asarray(coefficients.MUON[0])
  muon = optax.contrib._muon
  want = muon.orthogonalize_via_newton_schulz(x, triple)
  got = newton_schulz.orthogonalize(x, dtype=F32)
  np.testing.assert_allclose(got, want, atol=1e-5)


TREE = {
  'query': gaussian(3, 16, 2, 4, seed=1),
  'out': gaussian(3, 2, 4, 16, seed=2),
  'up': gaussian(3, 16, 24, seed=3),
  'head': gaussian(16, 24, seed=4),
}
NUMBERS = {
  'query': Numbers(1, (2, 3)),
  'out': Numbers((1, 2), 3),
  'up': Numbers(1, 2),
  'head': Numbers(0, 1),
}


def test_a_tree_is_its_leaves_one_by_one():
  got = newton_schulz.orthogonalize_tree(TREE, dimension_numbers=NUMBERS)
  for name, x in TREE.items():
    stack = matrices.to_stack(x, NUMBERS[name])
    want = newton_schulz.orthogonalize(stack)
    want = matrices.from_stack(want, x.shape, NUMBERS[name])
    np.testing.assert_allclose(got[name], want, atol=2e-2)


def test_equal_shapes_share_their_matmuls():

  def run(tree):
    return newton_schulz.orthogonalize_tree(tree, dimension_numbers=NUMBERS)

  text = str(jax.make_jaxpr(run)(TREE))
  # query and out are one shape once transposed, up and head another.
  assert text.count('dot_general') == 2 * 3 * 5


def test_strict_dtypes_and_the_leaf_dtype_come_back():
  with jax.numpy_dtype_promotion('strict'):
    y = newton_schulz.orthogonalize(gaussian(8, 4).astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16


def make_mesh(shape):
  auto = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh(shape, ('data', 'model'), axis_types=auto)


BOTH = {
  'query': P(None, 'data', 'model'),
  'out': P(None, 'model', None, 'data'),
  'up': P(None, 'data', 'model'),
  'head': P('model', 'data'),
}
MODEL = {
  'query': P(None, 'model'),
  'out': P(None, None, None, 'model'),
  'up': P(None, None, 'model'),
  'head': P('model'),
}


@pytest.mark.parametrize(
  ('shape', 'specs'), [((8, 1), BOTH), ((1, 8), MODEL), ((4, 2), BOTH)]
)
def test_a_mesh_gives_the_values_of_one_device(shape, specs):
  mesh = make_mesh(shape)
  tree = {
    name: jax.device_put(x, NamedSharding(mesh, specs[name]))
    for name, x in TREE.items()
  }

  def run(tree, layout):
    return newton_schulz.orthogonalize_tree(
      tree, dimension_numbers=NUMBERS, dtype=F32, layout=layout
    )

  run = jax.jit(run, static_argnums=1)
  got = run(tree, newton_schulz.Layout(mesh, ('data',), ('model',)))
  want = run(TREE, None)
  for name in tree:
    np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_a_mesh_moves_each_matrix_once_there_and_once_back():
  mesh = make_mesh((4, 2))
  sharding = NamedSharding(mesh, P(None, 'data', 'model'))
  x = jax.device_put(gaussian(8, 16, 32), sharding)

  layout = newton_schulz.Layout(mesh, ('data',), ('model',))

  def run(x):
    return newton_schulz.orthogonalize_tree({'w': x}, layout=layout)

  text = jax.jit(run).lower(x).compile().as_text()
  assert ' all-gather(' not in text
  # There and back, rows and columns; each multiplies one whole matrix.
  assert text.count(' all-to-all(') == 4
  shares = set(re.findall(r' = (\w+\[[\d,]*\])\S* dot\(', text))
  assert {s.split('[')[1] for s in shares} == {'16,16]', '16,32]'}
  # Matmuls across devices would be summed: only the norms are.
  sums = re.findall(r'= \(?(\w+\[[\d,]*\]).* all-reduce\(', text)
  assert set(sums) == {'f32[8]'}


@pytest.mark.parametrize('form', [iter, jnp.asarray])
def test_coefficients_may_be_an_iterator_or_an_array(form):
  x = {'a': gaussian(4, 8), 'b': gaussian(6, 3)}  # two shapes, two readings
  given = form(coefficients.MUON)
  run = jax.jit(lambda x: newton_schulz.orthogonalize_tree(x, given))
  want = newton_schulz.orthogonalize_tree(x, coefficients.MUON)
  for name, y in run(x).items():
    np.testing.assert_allclose(y, want[name], atol=3e-2)


def test_no_array_is_float64_where_those_are_allowed():
  with jax.enable_x64(True):
    run = jax.make_jaxpr(newton_schulz.orthogonalize)
    assert 'f64' not in str(run(jnp.ones((4, 8), F32)))
