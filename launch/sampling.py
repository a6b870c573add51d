"""Sampling from a model one token at a time, in constant memory for a Hope."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch.data.tokenizers import StreamDecoder, Tokenizer
from nestax.models import language_model, model_state

PIECE = 64  # tokens of a prefix that are read at once
LEAST_TEMPERATURE = 1e-6  # below it logits divided by it may overflow


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    temperature: 1 for the model's own distribution; 0 (or what is too small
      to divide by) takes the likeliest token.
    top_k: only the k likeliest tokens; 0 for all.
    top_p: only the likeliest tokens that together hold this probability.
    seed: of the draws, 0 to 2**32 - 1.
  """

  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise ValueError(f'temperature={self.temperature}: 0 or more, finite')
    if self.top_k < 0:
      raise ValueError(f'top_k={self.top_k}: 0 (all tokens) or more')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p}: above 0 and at most 1')
    if not 0 <= self.seed < 2**32:
      raise ValueError(f'seed={self.seed}: 0 to 2**32 - 1')


def restrict(logits_V, how: Sampling):
  """Scales by the temperature and rules out what top-k and top-p leave out."""
  logits_V = logits_V / how.temperature
  order = jnp.argsort(-logits_V)  # stable: of equal logits the first stays
  rank_V = jnp.argsort(order)
  keep_V = jnp.ones(logits_V.shape, bool)
  if how.top_k:
    keep_V = rank_V < how.top_k
  if how.top_p < 1:
    chance = jax.nn.softmax(logits_V)[order]
    before = jnp.cumsum(chance) - chance
    # the likeliest token always stays, however small top_p
    keep_V = keep_V & (before < how.top_p)[rank_V]
  return jnp.where(keep_V, logits_V, -jnp.inf)


def draw(key, logits_V, how: Sampling):
  """The next token's id; `key` is not read at temperature 0."""
  if how.temperature < LEAST_TEMPERATURE:
    return jnp.argmax(logits_V).astype(jnp.int32)
  chosen = jax.random.categorical(key, restrict(logits_V, how))
  return chosen.astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(model, params, state, tokens_1xL):
  state, logits_1xLxV = model.apply({'params': params}, state, tokens_1xL)
  return state, logits_1xLxV[0, -1]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(model, how, params, state, logits_V, allowed_V, key):
  """Draws a token and reads it: one program for every position."""
  key, own = jax.random.split(key)
  token = draw(own, jnp.where(allowed_V, logits_V, -jnp.inf), how)
  state, logits_1x1xV = model.apply(
    {'params': params}, state, token.reshape(1, 1)
  )
  return state, logits_1x1xV[0, 0], token, key


def stream(
  model: language_model.LanguageModel,
  params,
  prefix: Sequence[int],
  tokens: int,
  how: Sampling,
  allowed_V,
) -> Iterator[int]:
  """Yields sampled ids one at a time, without end of text handling.

  Args:
    model: the model.
    params: its parameters.
    prefix: ids to read first, at least one.
    tokens: how many ids to draw.
    how: how to draw them.
    allowed_V: bool, ids that may be drawn.

  Raises:
    ValueError: for an empty prefix, or ids that the model does not have.
  """
  prefix, V = np.asarray(prefix, np.int32), model.cfg.V
  if not prefix.size:
    raise ValueError('nothing to start from: give at least one token')
  if wrong := [token for token in prefix.tolist() if not 0 <= token < V]:
    raise ValueError(f'token id {wrong[0]}: the model has V={V} of them')
  state = model_state.init_state(model.cfg, 1, length=len(prefix) + tokens)
  # whole pieces, then single tokens: two programs, whatever the length
  whole = len(prefix) // PIECE * PIECE
  pieces = [prefix[i : i + PIECE] for i in range(0, whole, PIECE)]
  pieces += [prefix[i : i + 1] for i in range(whole, len(prefix))]
  for piece in pieces:
    state, logits_V = _read(model, params, state, jnp.asarray(piece[None]))
  key = jax.random.key(how.seed)
  allowed_V = jnp.asarray(allowed_V)
  for _ in range(tokens):
    state, logits_V, token, key = _step(
      model, how, params, state, logits_V, allowed_V, key
    )
    yield int(token)


def read_prompt(prompt: str, path: str | None, flag: str) -> str:
  """The prompt itself, or the text of a UTF-8 file.

  Args:
    prompt: '' for the file's.
    path: of the file; '' or None for the prompt.
    flag: that names the file, for messages.

  Raises:
    ValueError: if both are given, or naming the byte that is not UTF-8.
    OSError: naming flag and file, if it cannot be read.
  """
  if not path:
    return prompt
  if prompt:
    raise ValueError('give a prompt or a file that holds one, not both')
  try:
    return pathlib.Path(path).read_text(encoding='utf-8')
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{flag}={path}: there is no such file') from error
  except OSError as error:
    raise OSError(f'{flag}={path}: {error.strerror}') from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path} is not UTF-8 text: byte {error.start} cannot be decoded'
    ) from error


def text(
  model: language_model.LanguageModel,
  params,
  tokenizer: Tokenizer,
  prompt: str,
  tokens: int,
  how: Sampling,
) -> Iterator[str]:
  """Gives pieces of sampled text, until the document's end or `tokens`.

  Pieces never break a UTF-8 character. The prompt is not repeated.

  Raises:
    ValueError: at once, for a prompt that no UTF-8 bytes spell, or a tokenizer
      of more ids than the model has.
  """
  if tokenizer.vocab_size > model.cfg.V:
    raise ValueError(
      f'the tokenizer has {tokenizer.vocab_size} ids; the model knows '
      f'{model.cfg.V}'
    )
  try:
    prefix = tokenizer.encode(prompt) if prompt else []
  except UnicodeEncodeError as error:
    raise ValueError(
      f'the prompt is not UTF-8 text: character {error.start} cannot be encoded'
    ) from error
  if tokenizer.adds_bos or not prefix:
    prefix = [tokenizer.bos, *prefix]
  return _pieces(model, params, tokenizer, prefix, tokens, how)


def _pieces(model, params, tokenizer, prefix, tokens, how) -> Iterator[str]:
  # ids the tokenizer lacks, and specials other than the end, are no text
  allowed = np.zeros(model.cfg.V, bool)
  allowed[: tokenizer.vocab_size] = tokenizer.byte_lengths > 0
  allowed[tokenizer.eos] = True
  decoder = StreamDecoder(tokenizer)
  for token in prefix:  # what comes next may depend on what came before
    decoder.push(token)
  for token in stream(model, params, prefix, tokens, how, allowed):
    if token == tokenizer.eos:
      break
    piece = decoder.push(token)
    if piece:
      yield piece
  rest = decoder.flush()
  if rest:
    yield rest
