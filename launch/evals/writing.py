"""A model is asked: what it writes itself, until it stops."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch import sampling, trained
from nestax.launch.data.tokenizers import StreamDecoder, Tokenizer
from nestax.launch.evals import asking
from nestax.sleep import reader as readers
from nestax.sleep.reader import Rows

STRIDE = 16  # tokens that are written between two looks at what they say
GREEDY = sampling.Sampling(temperature=0.0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def _write(cfg, params, written, mixers, last_BxV, allowed_V, temperature, key):
  """Writes STRIDE tokens a row; `(mixers, logits after them, tokens)`."""
  read = readers.of_model(cfg, allowed_V).read
  last_BxV = jnp.where(allowed_V[None], last_BxV, readers.NEVER)

  def one(carry, key):
    state, logits_BxV = carry
    heat = jnp.where(temperature > 0, temperature, 1.0)
    drawn_B = jax.random.categorical(key, logits_BxV / heat)
    token_B = jnp.where(temperature > 0, drawn_B, logits_BxV.argmax(-1))
    token_B = token_B.astype(jnp.int32)
    state, logits_Bx1xV = read(params, state, token_B[:, None])
    return (state, logits_Bx1xV[:, 0]), token_B

  keys = jax.random.split(key, STRIDE)
  carry = Rows(mixers, written), last_BxV
  (state, last_BxV), tokens_LxB = jax.lax.scan(one, carry, keys)
  return state.mixers, last_BxV, tokens_LxB.T


def _allowed(cfg, tokenizer: Tokenizer) -> np.ndarray:
  """Ids that are text, or its end."""
  allowed = np.zeros(cfg.V, bool)
  allowed[: tokenizer.vocab_size] = tokenizer.byte_lengths > 0
  allowed[tokenizer.eos] = True
  return allowed


def write(
  asked: asking.Asked,
  tokenizer: Tokenizer,
  prompts: Sequence[asking.Tokens],
  most: int,
  stops: Sequence[str] = (),
  temperature: float = 0.0,
  key_seed: int = 0,
  show: Callable[[int], None] = lambda done: None,
) -> list[str]:
  """Goes on from prompts until the document's end, a stop or `most` tokens.

  Args:
    asked: the model.
    tokenizer: its own.
    prompts: ids, none empty.
    most: tokens to write, at least 1.
    stops: texts before which an answer ends.
    temperature: of the draws; 0 takes the likeliest.
    key_seed: of the draws.
    show: called with how many more have been answered.

  Returns:
    What was written after each prompt, without stop or prompt.

  Raises:
    ValueError: naming the first prompt that is empty.
  """
  asking.check(prompts)
  allowed = _allowed(asked.cfg, tokenizer)
  room = -(-most // STRIDE) * STRIDE
  order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
  said: list[str | None] = [None] * len(prompts)
  key = jax.random.key(key_seed)
  for at in range(0, len(order), asked.rows):
    batch = order[at : at + asked.rows]
    (mixers, written), last = asking.read_prompts(
      asked, [prompts[i] for i in batch], room
    )
    texts = [Text(tokenizer, prompts[i], most, stops) for i in batch]
    while not all(text.over for text in texts):
      key, own = jax.random.split(key)
      mixers, last, tokens = _write(
        asked.cfg,
        asked.params,
        written,
        mixers,
        last,
        allowed,
        temperature,
        own,
      )
      for text, row in zip(texts, np.asarray(tokens)):
        text.push(row.tolist())
    for i, text in zip(batch, texts):
      said[i] = text.text
    show(len(batch))
  return said


def write_learning(
  made: trained.Trained,
  prompt: asking.Tokens,
  most: int,
  stops: Sequence[str] = (),
  how: sampling.Sampling = GREEDY,
) -> str:
  """`write` after one prompt, the levels learning as it goes."""
  asking.check([prompt])
  text = Text(made.tokenizer, prompt, most, stops)
  allowed = _allowed(made.model.cfg, made.tokenizer)
  for token in sampling.stream(
    made.model, made.params, prompt, most, how, allowed
  ):
    text.push([token])
    if text.over:
      break
  return text.text


class Text:
  """What is written after a prompt, as far as it counts."""

  def __init__(self, tokenizer, prompt, most: int, stops: Sequence[str]):
    self._decoder, self._eos = StreamDecoder(tokenizer), tokenizer.eos
    for token in prompt:  # what comes next may depend on what came before
      self._decoder.push(token)
    self._left, self._stops = most, [stop for stop in stops if stop]
    self.text, self.over = '', most < 1

  def push(self, tokens: asking.Tokens) -> None:
    """Takes more tokens; those after the end say nothing."""
    for token in tokens:
      if self.over:
        return
      self._left -= 1
      ended = token == self._eos
      more = '' if ended else self._decoder.push(token)
      if ended or not self._left:
        self.over, more = True, more + self._decoder.flush()
      self.text += more
      found = [s for s in self._stops if s in self.text]
      if found:
        cut = min(self.text.index(stop) for stop in found)
        self.text, self.over = self.text[:cut], True
