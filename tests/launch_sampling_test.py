"""Sampling: what is ruled out, that streaming is the model, that seeds hold."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.launch import sampling
from nestax.launch.data import tokenizers
from nestax.launch.sampling import Sampling
from nestax.models import language_model, model_state
from nestax.models.config import ModelConfig


def small(family):
  cfg = ModelConfig.from_dict(
    {
      'family': family, 'D': 16, 'N': 1, 'H': 2, 'F': 24, 'dtype': 'float32',
      'memory': {'chunk_mem': 8, 'chunk_rest': 8},
    }
  )  # fmt: skip
  model = language_model.LanguageModel(cfg)
  init = jax.jit(lambda k: model.init(k, None, jnp.zeros((1, 1), jnp.int32)))
  params = nn.unbox(init(jax.random.key(0))['params'])
  # larger than at birth, so that the likeliest token changes with the text
  return model, jax.tree.map(lambda x: 3 * x, params)


@pytest.fixture(scope='module')
def hope():
  return small('hope')


@pytest.mark.parametrize('family', ['hope', 'transformer'])
@pytest.mark.parametrize('length', [3, sampling.PIECE + 2])
def test_greedy_stream_is_the_argmax_of_one_long_read(family, length):
  model, params = small(family)
  prefix = list(np.random.RandomState(0).randint(0, 256, length))
  allowed = np.ones(model.cfg.V, bool)
  how = Sampling(temperature=0.0)
  got = list(sampling.stream(model, params, prefix, 5, how, allowed))
  tokens = jnp.asarray([prefix + got[:-1]], jnp.int32)
  _, logits = jax.jit(model.apply)({'params': params}, None, tokens)
  want = jnp.argmax(logits[0, length - 1 :], axis=-1)
  assert got == list(want)


def test_restrictions_keep_the_likeliest():
  logits = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))

  def kept(**how):
    return list(np.isfinite(sampling.restrict(logits, Sampling(**how))))

  assert kept() == [True] * 4
  assert kept(top_k=2) == [False, True, False, True]
  assert kept(top_p=0.7, temperature=1.0) == [False, True, False, True]
  assert kept(top_p=0.01) == [False, True, False, False]
  assert kept(top_p=0.9, top_k=1) == [False, True, False, False]


def test_draws_follow_the_distribution():
  logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
  keys = jax.random.split(jax.random.key(0), 4000)
  how = Sampling(temperature=1.0)
  drawn = jax.vmap(lambda k: sampling.draw(k, logits, how))(keys)
  share = np.bincount(drawn, minlength=3) / len(keys)
  np.testing.assert_allclose(share, [0.1, 0.6, 0.3], atol=0.03)


def test_text_repeats_with_its_seed_and_has_no_specials(hope):
  tokenizer = tokenizers.load('bytes')

  def text(seed):
    how = Sampling(temperature=1.5, seed=seed)
    return ''.join(sampling.text(*hope, tokenizer, 'def', 40, how))

  assert text(1) == text(1)
  assert text(1) != text(2)
  assert 0 < len(text(1)) <= 40


def test_a_hope_needs_no_more_memory_for_a_longer_text(hope):
  def size(length):
    state = model_state.init_state(hope[0].cfg, 1, length=length)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

  assert size(10) == size(1_000_000)


@pytest.mark.parametrize(
  'wrong',
  [
    {'temperature': -1.0},
    {'temperature': float('inf')},
    {'top_k': -2},
    {'top_p': 0.0},
    {'seed': 2**32},
  ],
)
def test_wrong_settings_are_refused_by_name(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    Sampling(**wrong)


def test_a_tiny_temperature_takes_the_likeliest():
  logits = jnp.array([0.0, 3.0, 2.9])
  how = Sampling(temperature=1e-40)
  keys = jax.random.split(jax.random.key(0), 8)
  assert all(sampling.draw(key, logits, how) == 1 for key in keys)


def test_a_prompt_that_is_no_text_is_refused_before_anything_is_drawn(hope):
  with pytest.raises(ValueError, match='character 1'):
    sampling.text(*hope, tokenizers.load('bytes'), 'a\udcff', 3, Sampling())


def test_an_empty_prefix_is_refused(hope):
  stream = sampling.stream(*hope, [], 1, Sampling(), np.ones(272, bool))
  with pytest.raises(ValueError, match='at least one token'):
    next(stream)


@pytest.mark.parametrize('token', [-1, 272])
def test_ids_that_the_model_does_not_have_are_refused(hope, token):
  model, params = hope
  allowed = np.ones(model.cfg.V, bool)
  said = sampling.stream(model, params, [1, token], 2, Sampling(), allowed)
  with pytest.raises(ValueError, match=f'token id {token}: .*V=272'):
    next(said)


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(hope):
  tokenizer = tokenizers.load('bytes')
  cfg = dataclasses.replace(hope[0].cfg, V=tokenizer.vocab_size - 1)
  model = language_model.LanguageModel(cfg)
  with pytest.raises(ValueError, match='has 259 ids; the model knows 258'):
    sampling.text(model, hope[1], tokenizer, 'a', 2, Sampling())
