"""Stacked levels: at rate 0 the Transformer, at another rate a learner."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.models import language_model, model_state, stacking
from nestax.models.config import ModelConfig
from nestax.models.continuum import CMSConfig

BASE = ModelConfig(
  family='transformer',
  V=31,
  D=16,
  N=3,
  H=2,
  G=1,
  F=24,
  rope_base=500.0,
  epsilon=1e-5,
  tied=False,
  dtype='float32',
)
LENGTH = 16
WAYS = pytest.mark.parametrize('how', stacking.HOW)


@pytest.fixture(scope='module')
def trained():
  """Parameters as of training, tokens and the logits that they give."""
  tokens_BxL = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, BASE.V)
  model = language_model.LanguageModel(BASE)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), None, tokens_BxL))
  params = params['params']
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  # first values are too regular: norms of one, a head of almost nothing
  leaves = [
    x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)
  ]
  params = jax.tree.unflatten(tree, leaves)
  return params, tokens_BxL, logits(BASE, params, tokens_BxL)


@functools.cache
def applied(cfg):
  return jax.jit(language_model.LanguageModel(cfg).apply)


def logits(cfg, params, tokens_BxL):
  return applied(cfg)({'params': params}, None, tokens_BxL)[1]


def stream(cfg, params, tokens_BxL, size):
  """Logits of the tokens read in pieces, the state carried over."""
  state = model_state.init_state(cfg, tokens_BxL.shape[0], length=LENGTH)
  found = []
  for piece in jnp.split(tokens_BxL, tokens_BxL.shape[1] // size, 1):
    state, y_BxLxV = applied(cfg)({'params': params}, state, piece)
    found.append(y_BxLxV)
  return jnp.concatenate(found, 1)


def cms(**options):
  return CMSConfig(
    **{'periods': (4, 8), 'blocks': 'all', 'rate': 0.0} | options
  )


@WAYS
def test_at_rate_0_the_logits_are_the_originals(trained, how):
  params, tokens_BxL, want = trained
  stacked = stacking.stack(BASE, params, how, cms(blocks='1,2'))
  np.testing.assert_allclose(logits(*stacked, tokens_BxL), want, atol=1e-4)


@pytest.mark.parametrize(
  'how', ['groups', pytest.param('copies', marks=pytest.mark.slow)]
)
def test_a_stream_at_rate_0_gives_the_originals_logits(trained, how):
  params, tokens_BxL, want = trained
  stacked = stacking.stack(BASE, params, how, cms())
  found = stream(*stacked, tokens_BxL[:, :14], size=7)  # inside a chunk
  np.testing.assert_allclose(found, want[:, :14], atol=1e-4)


@WAYS
def test_blocks_none_ignores_the_rate(trained, how):
  params, tokens_BxL, want = trained
  stacked = stacking.stack(BASE, params, how, cms(blocks='none', rate=1.0))
  np.testing.assert_allclose(logits(*stacked, tokens_BxL), want, atol=1e-4)


@WAYS
def test_at_another_rate_the_logits_change_after_the_first_commit(trained, how):
  params, tokens_BxL, want = trained
  stacked = stacking.stack(BASE, params, how, cms(rate=0.5))
  found = logits(*stacked, tokens_BxL)
  np.testing.assert_allclose(found[:, :4], want[:, :4], atol=1e-4)
  moved = jnp.abs(found - want).max(axis=(0, 2))
  assert moved[4:].min() > 1e-3, moved


def test_groups_give_the_first_blocks_the_fastest_period(trained):
  cfg, _ = stacking.stack(BASE, trained[0], 'groups', cms())
  assert [group.blocks for group in cfg.groups] == [(0, 1), (2,)]


def test_copies_are_as_many_as_the_periods(trained):
  cfg, params = stacking.stack(BASE, trained[0], 'copies', cms())
  assert len(cfg.schedule.levels) == 2
  for i in range(2):
    assert params['blocks'][f'level_{i}'] is trained[0]['blocks']['level_0']


@WAYS
def test_the_parameters_are_those_that_the_model_wants(trained, how):
  cfg, params = stacking.stack(BASE, trained[0], how, cms(blocks='1,2'))
  want = nn.unbox(language_model.abstract_params(cfg))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, want)


@WAYS
def test_the_original_is_left_as_it_was(trained, how):
  before = jax.tree.structure(trained[0])
  stacking.stack(BASE, trained[0], how, cms())
  assert jax.tree.structure(trained[0]) == before


def test_what_cannot_be_stacked_is_refused_in_words(trained):
  with pytest.raises(ValueError, match="how='layers': one of"):
    stacking.stack(BASE, trained[0], 'layers', cms())
  hope = ModelConfig(family='hope')
  with pytest.raises(
    ValueError, match="family='hope': only the MLPs of a tran"
  ):
    stacking.stack(hope, {}, 'groups', cms())
