"""Reading and sampling while nothing is learned: what sleep does all night.

Awake, levels commit while the model reads. A teacher whose weights moved while
it was asked would be another one at every question, so here what the levels
have written is held fixed: only the mixers' state goes on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nestax.cms.stream import Piece, written
from nestax.models import active, language_model, model_state, segments
from nestax.models.config import ModelConfig
from nestax.models.continuum import Segment

# A logit that nothing reaches; finite, so that differences of two stay numbers.
NEVER = -1e30


class Reader(NamedTuple):
  """A model as sleep asks it; two functions, both pure.

  Attributes:
    fresh: `(context, rows, length) -> state` of rows that have read nothing
      and will read `length` tokens, however many at a time; 0 if they are read
      once and nobody goes on from there, which is cheaper. The context is what
      all of them know already, a pytree or None; where it is of O owners, row
      i belongs to owner `i // (rows // O)`.
    read: `(params, state, tokens_BxL, length_B=None) -> (state,
      logits_BxLxV)`, float32; of a row the first `length_B` tokens count, or
      all, and the others change no state.
  """

  fresh: Callable[[Any, int, int], Any]
  read: Callable[..., tuple[Any, jax.Array]]


class Rows(NamedTuple):
  """State of the frozen reader: the mixers go on, the weights stay."""

  mixers: Any  # leaves [N, B, ...]; None if nobody goes on from what is read
  written: Any  # what levels add to the slow weights, [n, O, ...], or None


def of_model(cfg: ModelConfig, allowed_V=None) -> Reader:
  """The reader of a model, levels frozen.

  Its context is what the levels of O owners have written, as `learned` gives
  it, or None for the slow weights alone.

  Args:
    cfg: the model.
    allowed_V: bool, ids that may be said; the logits of others are NEVER.
  """

  def fresh(context, rows, length):
    if context is not None:
      owners = jax.tree.leaves(context)[0].shape[1]
      if rows % owners:
        raise ValueError(
          f'{rows} rows cannot be shared out among {owners} owners: give a '
          'multiple'
        )
    if not length:
      return Rows(None, context)
    # no levels of every row, which would be as many models
    return Rows(model_state.init_mixers(cfg, rows, length), context)

  def read(params, state, tokens_BxL, length_B=None):
    mixers, logits_BxLxV = _read(cfg, params, state, tokens_BxL, length_B)
    if allowed_V is not None:
      allowed_1x1xV = jnp.asarray(allowed_V)[None, None]
      logits_BxLxV = jnp.where(allowed_1x1xV, logits_BxLxV, NEVER)
    return state._replace(mixers=mixers), logits_BxLxV

  return Reader(fresh, read)


def learned(state: model_state.ModelState):
  """What the levels of each sequence have written: a reader's context."""
  return None if state.levels is None else written(state.levels.levels)


def _read(cfg: ModelConfig, params, state: Rows, tokens_BxL, length_B):
  rows = tokens_BxL.shape[0]
  owners = rows
  if state.written is not None:
    owners = jax.tree.leaves(state.written)[0].shape[1]
  if rows == owners:
    return _read_as_one(cfg, params, state, tokens_BxL, length_B)

  # one row at a time under two vmaps: what an owner has written is there once
  def one(mixers, written, tokens_L, length):
    row = jax.tree.map(lambda x: x[:, None], Rows(mixers, written))
    mixers, logits_1xLxV = _read_as_one(
      cfg, params, row, tokens_L[None], None if length is None else length[None]
    )
    return jax.tree.map(lambda x: x[:, 0], mixers), logits_1xLxV[0]

  def split(x, axis):
    shape = (*x.shape[:axis], owners, rows // owners, *x.shape[axis + 1 :])
    return x.reshape(shape)

  each = jax.vmap(one, in_axes=(1, None, 0, 0), out_axes=(1, 0))
  every = jax.vmap(each, in_axes=(1, 1, 0, 0), out_axes=(1, 0))
  mixers, logits = every(
    jax.tree.map(lambda x: split(x, 1), state.mixers),
    state.written,
    split(tokens_BxL, 0),
    None if length_B is None else split(length_B, 0),
  )
  mixers = jax.tree.map(lambda x, like: x.reshape(like.shape), mixers, state[0])
  return mixers, logits.reshape(rows, *logits.shape[2:])


def _read_as_one(cfg: ModelConfig, params, state: Rows, tokens_BxL, length_B):
  """Rows whose owners are as many, or that know nothing of their own."""
  params = nn.unbox(params)
  model = language_model.LanguageModel(cfg)

  def head(params, x_BxLxD):
    return model.apply({'params': params}, x_BxLxD, method='logits')

  def cut(start, stop):
    return jax.tree.map(lambda x: x[start:stop], state.mixers)

  x_BxLxD = model.apply(
    {'params': params}, tokens_BxL, method=lambda m, t: m.embed(t)
  )
  first = cfg.N if state.written is None else cfg.adapting[0]
  trunk = cut(0, first)
  if first:
    trunk, x_BxLxD, _ = segments.run_blocks(
      cfg,
      params['blocks'],
      Segment(0, first, None),
      trunk,
      x_BxLxD,
      None,
      length_B=length_B,
    )
  if first == cfg.N:
    return trunk, head(params, x_BxLxD)
  piece = Piece(x_BxLxD, tokens_BxL, None)
  forward = active.net(cfg, params, head, aligned=False).forward
  mixers, x_BxLxD, _ = forward(
    state.written, cut(first, cfg.N), piece, length_B, None
  )
  if first:
    mixers = jax.tree.map(lambda *x: jnp.concatenate(x), trunk, mixers)
  return mixers, head(params, x_BxLxD)


class Said(NamedTuple):
  """Token rows: a prompt, what was said after it, then padding."""

  tokens_BxL: jax.Array  # int32
  start_B: jax.Array  # tokens of the prompt, at least 1
  length_B: jax.Array  # prompt and what was said, the end token included

  @property
  def said_BxL(self):
    """Which tokens were said."""
    place_1xL = jnp.arange(self.tokens_BxL.shape[1])[None]
    return (place_1xL >= self.start_B[:, None]) & (
      place_1xL < self.length_B[:, None]
    )


def sample(
  reader: Reader,
  params,
  context,
  prompts: Said,
  key,
  temperature: float = 1.0,
  eos: int = -1,
  pad: int = 0,
  most: int = 0,
) -> Said:
  """Goes on from prompts until the rows are full or their end is said.

  The prompts are read at once, whatever their lengths; what is said is one
  scan over tokens. A call for `jax.jit`, or for a caller that is jitted. No
  gradient is to go through it.

  Args:
    reader: of the model.
    params: its parameters.
    context: what the rows know, see `Reader`.
    prompts: the first `start_B` tokens of each row count.
    key: of the draws.
    temperature: 1 for the model's own distribution, 0 for the likeliest.
    eos: id that ends a row; -1 if none does.
    pad: id of what is after the end.
    most: tokens to say, at most; 0 for as many as there is room for.
  """
  B, L = prompts.tokens_BxL.shape
  most = min(most, L - 1) or L - 1
  place_1xL = jnp.arange(L)[None]
  state, logits_BxLxV = reader.read(
    params,
    reader.fresh(context, B, L),
    prompts.tokens_BxL,
    prompts.start_B,
  )
  last_Bx1x1 = (prompts.start_B - 1)[:, None, None]
  first_BxV = jnp.take_along_axis(logits_BxLxV, last_Bx1x1, 1)[:, 0]

  def say(row, logits_BxV, key):
    tokens_BxL, length_B, done_B = row
    if temperature:
      token_B = jax.random.categorical(key, logits_BxV / temperature)
    else:
      token_B = logits_BxV.argmax(-1)
    token_B = token_B.astype(jnp.int32)
    here_BxL = (place_1xL == length_B[:, None]) & ~done_B[:, None]
    tokens_BxL = jnp.where(here_BxL, token_B[:, None], tokens_BxL)
    length_B = length_B + here_BxL.any(1)
    return (tokens_BxL, length_B, done_B | (token_B == eos)), token_B

  def one(carry, key):
    state, row, token_B = carry
    state, logits_Bx1xV = reader.read(params, state, token_B[:, None])
    row, token_B = say(row, logits_Bx1xV[:, 0], key)
    return (state, row, token_B), None

  keys = jax.random.split(key, most)
  start_B = prompts.start_B.astype(jnp.int32)
  row = prompts.tokens_BxL, start_B, jnp.zeros((B,), bool)
  carry = state, *say(row, first_BxV, keys[0])
  (_, (tokens_BxL, length_B, _), _), _ = jax.lax.scan(one, carry, keys[1:])
  tokens_BxL = jnp.where(place_1xL < length_B[:, None], tokens_BxL, pad)
  return Said(tokens_BxL, start_B, length_B)


def score(reader: Reader, params, context, tokens_BxL):
  """Logits for every token but the first, each given those before it.

  Returns:
    float32 `[B, L - 1, V]`; entry t is for token t + 1.
  """
  state = reader.fresh(context, len(tokens_BxL), 0)
  _, logits_BxLxV = reader.read(params, state, tokens_BxL[:, :-1])
  return logits_BxLxV


_score = jax.jit(score, static_argnums=0)


def scored(reader: Reader, params, context, tokens_BxL):
  """`score` as one program for all who ask about rows of one shape.

  A night has many such questions, and a model takes longer to compile than to
  read.
  """
  first = jax.tree.leaves(params)[0]
  if getattr(first, 'committed', False) and len(first.devices()) == 1:
    # tokens that were put there and others would make two programs
    tokens_BxL = jax.device_put(tokens_BxL, *first.devices())
  return _score(reader, params, context, tokens_BxL)
