"""The loss by pieces of a row is the loss of the row."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from nestax.launch import loss
from nestax.launch import step as steps
from nestax.models.config import ModelConfig
from nestax.models.language_model import LanguageModel

B, L, V = 2, 12, 24


def make(**given):
  cfg = ModelConfig(
    family='transformer', V=V, D=8, N=1, H=2, F=16, dtype='float32', **given
  )
  model = LanguageModel(cfg)
  rng = np.random.default_rng(0)
  tokens, targets = rng.integers(0, V, (2, B, L)).astype(np.int32)
  batch = {
    'tokens': tokens,
    'targets': targets,
    'weights': (rng.random((B, L)) < 0.7).astype(np.float32),
    'bytes': rng.integers(0, 4, (B, L)).astype(np.int32),
    'reset': rng.random((B, L)) < 0.1,
  }
  init = jax.jit(model.init)(jax.random.key(0), None, tokens)
  return model, nn.unbox(init['params']), batch


@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'head'])
def test_pieces_of_a_row_add_up_with_their_gradients(tied):
  model, params, batch = make(tied=tied)

  def measured(piece):
    score = steps.scorer(model, piece)

    def nats(params, batch):
      total, memory = score(params, None, batch)
      assert memory is None
      return total.nats, total

    return jax.jit(jax.grad(nats, has_aux=True))(params, batch)

  want = measured(0)
  assert want[1].weight == batch['weights'].sum() > 0
  # 5 does not divide 12: three pieces of four
  for piece in (5, L):
    got = measured(piece)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, want
    )


def test_no_more_logits_than_a_piece_are_made():
  model, params, batch = make()

  def largest(piece):
    score = steps.scorer(model, piece)
    grad = jax.grad(lambda params: score(params, None, batch)[0].nats)
    text = jax.jit(grad).lower(params).as_text()
    return f'{B}x{L}x{V}x' in text, f'{B}x4x{V}x' in text

  assert largest(0) == (True, False)
  assert largest(5) == (False, True)


def test_the_loss_is_optax_s_and_nothing_is_scattered():
  rng = np.random.default_rng(1)
  logits = 5 * rng.normal(size=(B, L, V)).astype(np.float32)
  *_, batch = make()

  def reference(logits):
    nats = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['targets']
    )
    return (nats * batch['weights']).sum()

  nats = lambda logits: loss.sums(logits, batch).nats  # noqa: E731
  want, got = (
    jax.jit(jax.value_and_grad(f))(logits) for f in (reference, nats)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    got,
    want,
  )
  # what is scattered goes one by one on a TPU
  assert 'scatter' in str(jax.make_jaxpr(jax.grad(reference))(logits))
  assert 'scatter' not in str(jax.make_jaxpr(jax.grad(nats))(logits))
