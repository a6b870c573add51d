"""Models and readers small enough for tests of sleep."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestax.models import language_model, model_state
from nestax.models.config import ModelConfig
from nestax.models.continuum import CMSConfig
from nestax.sleep import reader as readers

V = 16
W = 4  # words of the tables


@functools.cache
def config(family='hope_attention', N=2, **cms):
  cms = {'periods': (4, 8), 'blocks': 'all', 'rate': 0.5, **cms}
  return ModelConfig(
    family=family,
    V=V,
    D=8,
    N=N,
    H=2,
    F=16,
    dtype='float32',
    cms=CMSConfig(**cms),
  )


@functools.cache
def params_of(cfg, seed=0):
  model = language_model.LanguageModel(cfg)
  tokens = jnp.zeros((1, 1), jnp.int32)
  return nn.unbox(
    jax.jit(model.init)(jax.random.key(seed), None, tokens)['params']
  )


@functools.cache
def applied(cfg):
  """The model's `apply`, compiled once."""
  return jax.jit(language_model.LanguageModel(cfg).apply)


def tokens(B, L, seed=1):
  return jax.random.randint(jax.random.key(seed), (B, L), 0, V)


def day(cfg, B, seed=3):
  """A fresh state whose levels have written something: random numbers.

  Reading until levels commit compiles for much longer than what is tested.
  """
  state = model_state.init_state(cfg, B, 32)
  leaves, tree = jax.tree.flatten([x.delta for x in state.levels.levels])
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  deltas = tree.unflatten(
    [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  )
  levels = tuple(
    x._replace(delta=d) for x, d in zip(state.levels.levels, deltas)
  )
  return state._replace(levels=state.levels._replace(levels=levels))


def table_reader():
  """A model that is a table of logits, `params [V, V]`: token to next."""

  def fresh(context, rows, length):
    del context, length
    return jnp.zeros((rows,))

  def read(params, state, tokens_BxL, length_B=None):
    del length_B  # what is read leaves nothing behind
    return state, params[tokens_BxL]

  return readers.Reader(fresh, read)


def table(seed, scale=1.5):
  """Logits of a table's words, each after each."""
  return scale * jax.random.normal(jax.random.key(seed), (W, W))


def knowing_reader():
  """A table to which what each owner knows is added, `context [O, W]`."""

  def fresh(context, rows, length):
    return jnp.repeat(context, rows // len(context), axis=0)

  def read(params, state, tokens_BxL, length_B=None):
    return state, params[tokens_BxL] + state[:, None]

  return readers.Reader(fresh, read)
