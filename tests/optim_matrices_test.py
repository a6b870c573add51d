"""Parameters read as stacks of matrices, and put back."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nestax.optim import matrices

Numbers = matrices.MuonDimensionNumbers
CASES = [
  ((5, 7), Numbers(0, 1), (1, 5, 7)),
  ((5, 7), Numbers(1, 0), (1, 7, 5)),
  ((3, 5, 2, 4), Numbers(1, (2, 3)), (3, 5, 8)),
  ((3, 2, 4, 5), Numbers((1, 2), 3), (3, 8, 5)),
  ((3, 5, 2, 4), Numbers(1, 3), (6, 5, 4)),
  ((2, 3, 5, 7), Numbers(-2, -1), (6, 5, 7)),
]


@pytest.mark.parametrize(('shape', 'numbers', 'want'), CASES)
def test_stack_and_back(shape, numbers, want):
  x = jnp.arange(np.prod(shape)).reshape(shape)
  stack = matrices.to_stack(x, numbers)
  assert stack.shape == want
  assert matrices.sizes(shape, numbers) == want[1:]
  np.testing.assert_array_equal(matrices.from_stack(stack, shape, numbers), x)


def test_a_query_kernel_is_the_matrix_of_its_einsum():
  kernel_DxHxK = np.random.default_rng(0).normal(size=(5, 2, 4))
  x_D = np.arange(5.0)
  stack = matrices.to_stack(jnp.asarray(kernel_DxHxK), Numbers(0, (1, 2)))
  want = np.einsum('d,dhk->hk', x_D, kernel_DxHxK)
  np.testing.assert_allclose(x_D @ stack[0], want.ravel(), rtol=1e-5)


def test_masked_leaves_need_no_numbers_and_may_have_some():
  tree = {'a': jnp.ones((2, 3)), 'b': optax.MaskedNode()}
  found = matrices.resolve(tree, {'a': Numbers(0, 1), 'b': Numbers(1, 0)})
  assert found['a'] == Numbers(0, 1)


@pytest.mark.parametrize(
  ('numbers', 'words'),
  [
    ({'b': Numbers(0, 1)}, 'a has no dimension numbers.* given: b'),
    ({'a': (0, 1)}, 'a has no dimension numbers'),
    ({'a': Numbers(0, 2)}, 'out of range'),
    ({'a': Numbers(1, -1)}, 'twice'),
  ],
)
def test_numbers_that_do_not_fit_are_refused(numbers, words):
  with pytest.raises(matrices.MatrixError, match=words):
    matrices.resolve({'a': jnp.ones((2, 3))}, numbers)


def test_a_vector_is_refused():
  with pytest.raises(matrices.MatrixError, match='scale .* needs 2 axes'):
    matrices.resolve({'scale': jnp.ones(3)}, None)


@pytest.mark.parametrize('dtype', ['int32', 'complex64'])
def test_what_is_no_float_is_refused(dtype):
  with pytest.raises(matrices.MatrixError, match=f'w has the dtype {dtype}'):
    matrices.resolve({'w': jnp.ones((2, 3), dtype)}, None)
