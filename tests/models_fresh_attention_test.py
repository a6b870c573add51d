"""Attention in blocks against all logits at once; kernels are interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.models import (
  blockwise,
  flash_gpu,
  flash_tpu,
  fresh_attention,
)
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


def gpu(window, q, k, v, start, first):
  return fresh_attention._gpu(window, q, k, v, start, first, interpret=True)


def tpu(window, q, k, v, start, first):
  return flash_tpu.attention(q, k, v, start, window=window, interpret=True)


def queries(window, q, k, v, start, first):
  return blockwise.read(q, k, v, start, first, window=window, block=64)


@pytest.mark.parametrize(
  'by,name',
  [
    *((gpu, name) for name in CASES),
    (tpu, 'grouped'),
    (tpu, 'short_window'),
    (queries, 'grouped'),
    (queries, 'persistent'),
  ],
)
def test_values_and_gradients_are_those_of_all_logits(by, name):
  case, persistent = CASES[name], name == 'persistent'
  args, start, g = given(**case, dtype=jnp.float32, persistent=persistent)

  def run(read):
    def both(args, g):
      y, back = jax.vjp(
        lambda q, k, v, first: read(case['window'], q, k, v, start, first),
        *args,
      )
      return y, back(g)

    return jax.jit(both)(args, g)

  def dense(window, *args):
    return fresh_attention.read(window, False, *args)

  got, want = run(by), run(dense)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert np.linalg.norm(x - y) < 3e-6 * np.linalg.norm(y)


def test_kernels_are_lowered_for_cuda_and_interpreted_elsewhere(monkeypatch):
  monkeypatch.setattr(flash_gpu, 'capability', lambda: '9.0')
  (q, k, v, _), start, _ = given(
    **CASES['short_window'], dtype=jnp.bfloat16, persistent=False
  )

  def loss(q, k, v):
    y = fresh_attention.read(0, True, q, k, v, start, None)
    return jnp.sum(y.astype(jnp.float32))

  device = jax.sharding.AbstractDevice('NVIDIA H100', 132, 'gpu')
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((1,), ('x',), auto, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  for kernel in ('forward', 'queries', 'keys'):
    assert f'attention_{kernel}' in text
  assert 'triton' in text
  assert 'triton' not in traced.lower(lowering_platforms=('cpu',)).as_text()


@pytest.mark.parametrize('documents', [False, True])
def test_long_rows_never_hold_all_their_logits(documents):
  L = 2 * blockwise.LONG
  like = jax.ShapeDtypeStruct((1, L, 1, 8), jnp.float32)
  start = jax.ShapeDtypeStruct((1, L), jnp.int32) if documents else None

  def loss(q, k, v, start):
    return fresh_attention.read(0, True, q, k, v, start, None).sum()

  step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(like, like, like, start)
  assert f'{L}x{L}' not in step.as_text()
  assert f'{blockwise.BLOCK}x{L}' in step.as_text()
