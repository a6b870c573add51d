"""The GPU's attention in blocks against all logits at once, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.models import attention
from nestax.models.persistent import Persistent

CASES = {
  # rows of several blocks and an odd rest; shared keys; borders everywhere
  'grouped': dict(B=2, L=300, H=4, G=2, K=16, window=0, documents=0.02),
  'window': dict(B=1, L=300, H=1, G=1, K=16, window=70, documents=0.0),
  # all but the outer blocks of keys are seen by whole blocks of queries
  'long_documents': dict(B=2, L=640, H=1, G=1, K=16, window=0, documents=0.003),
  'short_window': dict(B=2, L=260, H=2, G=1, K=16, window=5, documents=0.05),
  'persistent': dict(B=1, L=200, H=4, G=2, K=16, window=50, documents=0.02),
}


def given(B, L, H, G, K, window, documents, dtype, persistent):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  q, k, v, g = (normal(B, L, heads, K) for heads in (H, G, G, H))
  begins_BxL = rng.random((B, L)) < documents
  begins_BxL[-1, 127] = documents > 0  # the last key of a block
  # `segment_starts`: rows begin in a document from before
  start_BxL = np.where(begins_BxL, np.arange(L), -(1 << 30))
  start_BxL = np.maximum.accumulate(start_BxL, axis=1).astype(np.int32)
  first = None
  if persistent:
    first = Persistent(normal(B, L, H, K), normal(3, G, K), normal(3, G, K))
  return (q, k, v, first), start_BxL, g


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_are_those_of_all_logits(name):
  case = CASES[name]
  args, start, g = given(
    **case, dtype=jnp.float32, persistent=name == 'persistent'
  )

  def by(read):
    def both(args, g):
      y, back = jax.vjp(read, *args)
      return y, back(g)

    return jax.jit(both)(args, g)

  def blocked(q, k, v, first):
    return attention._blocked(
      case['window'], q, k, v, start, first, interpret=True
    )

  def dense(q, k, v, first):
    return attention._attend(case['window'], False, q, k, v, start, first)

  got, want = by(blocked), by(dense)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert np.linalg.norm(x - y) < 3e-6 * np.linalg.norm(y)
