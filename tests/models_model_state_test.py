"""States of sequences are made, and rows of them taken out and put in.

Where their leaves lie on a mesh is in `models_state_axes_test`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.models import model_state
from nestax.models.config import ModelConfig

B, L = 2, 12
LEARNS = {'cms': {'periods': (4, 8), 'blocks': 'all', 'rate': 0.1}}


def fresh(options=None, batch=B):
  values = {'family': 'hope', 'V': 16, 'D': 8, 'N': 2, 'H': 2, 'F': 24}
  values |= {'memory': {'chunk_mem': 4, 'chunk_rest': 4}, 'dtype': 'float32'}
  cfg = ModelConfig.from_dict(values | (options or {}))
  return model_state.init_state(cfg, batch, L)


@pytest.mark.parametrize('batch', [-1, 2.0, '2', None])
def test_a_batch_that_is_no_number_is_refused(batch):
  with pytest.raises(ValueError, match='batch=.*whole number of sequences'):
    fresh(batch=batch)


@pytest.mark.parametrize('row', [-1, B, 5])
def test_a_row_that_is_not_there_is_refused(row):
  state = fresh(LEARNS)
  one = model_state.take_row(state, 0)
  words = f'row {row} of a state of 2.*from 0 to 1'
  with pytest.raises(IndexError, match=words):
    model_state.take_row(state, row)
  with pytest.raises(IndexError, match=words):
    model_state.put_row(state, row, one)


def test_what_is_no_row_of_the_state_is_not_put_into_it():
  state = fresh(LEARNS)
  with pytest.raises(ValueError, match=r'another model.*\(2, 2,.*not \(2, 1,'):
    model_state.put_row(state, 0, state)
  with pytest.raises(ValueError, match='another model.*it has no levels'):
    model_state.put_row(state, 0, fresh(batch=1))


def test_a_row_may_be_traced_where_it_is_put():
  state = jax.tree.map(jnp.ones_like, fresh(LEARNS))
  one = model_state.take_row(fresh(LEARNS), 0)
  got = jax.jit(model_state.put_row)(state, 1, one)
  want = model_state.put_row(state, np.int64(1), one)
  jax.tree.map(np.testing.assert_array_equal, got, want)
