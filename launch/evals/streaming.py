"""Perplexity over a long text, read once, the state carried all along.

The levels that learn can be on, off (the same weights, frozen) or reset every
so many tokens; everything else is equal, the memories and caches included.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch import loss
from nestax.models import language_model, model_state


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a text is read.

  Attributes:
    levels: 'on', or 'off' to freeze the levels.
    reset: tokens after which the levels forget, as at a document's start; 0
      for never. A multiple of `piece`.
    piece: tokens a call.
    window: tokens that attention can look back on.
  """

  levels: str = 'on'
  reset: int = 0
  piece: int = 512
  window: int = 2048

  def __post_init__(self):
    if self.levels not in ('on', 'off'):
      raise ValueError(f"levels={self.levels!r}: 'on' or 'off'")
    for name, least in (('piece', 1), ('window', 1), ('reset', 0)):
      if getattr(self, name) < least:
        raise ValueError(f'{name}={getattr(self, name)}: at least {least}')
    if self.reset % self.piece:
      raise ValueError(
        f'reset={self.reset}: a multiple of piece={self.piece} tokens'
      )


class Reading(NamedTuple):
  """What one call read, summed over its scored tokens; arrays of levels."""

  tokens: int  # read up to and with this call
  nats: float
  scored: float
  bytes: float
  commits: np.ndarray  # so far, [P]
  moved: np.ndarray  # Frobenius norm of the last update, [P]
  size: np.ndarray  # Frobenius norm of all that is written, [P]
  surprise: float  # inner objective of the last chunk, nats a token


def frozen(model: language_model.LanguageModel) -> language_model.LanguageModel:
  """The same model with levels that do not learn."""
  cms = dataclasses.replace(model.cfg.cms, blocks='none')
  return model.clone(cfg=dataclasses.replace(model.cfg, cms=cms))


def read(
  model: language_model.LanguageModel,
  params,
  tokens,
  byte_lengths,
  settings: Settings = Settings(),
  show: Callable[[Reading], None] = lambda reading: None,
) -> Iterator[Reading]:
  """Reads a text and yields what each call met.

  Args:
    model: the model.
    params: its parameters.
    tokens: ids `[L]`; the last piece may be shorter.
    byte_lengths: UTF-8 bytes of every id, for bits per byte.
    settings: how to read.
    show: called with every Reading as it comes.

  Raises:
    ValueError: for fewer than two tokens.
  """
  tokens = np.asarray(tokens, np.int32)
  if len(tokens) < 2:
    raise ValueError(f'{len(tokens)} tokens: nothing to predict')
  if settings.levels == 'off':
    model = frozen(model)
  params = nn.unbox(params)
  step = _step(model)
  length = min(settings.window, len(tokens))
  state = model_state.init_state(model.cfg, 1, length)
  sizes = jnp.asarray(byte_lengths, jnp.int32)
  for start in range(0, len(tokens) - 1, settings.piece):
    inputs = tokens[start : start + settings.piece]
    targets = tokens[start + 1 : start + settings.piece + 1]
    inputs = inputs[: len(targets)]
    if settings.reset and start and start % settings.reset == 0:
      state = model_state.forget_levels(model.cfg, state)
    state, total, levels = step(params, state, inputs, targets, sizes)
    total, levels = jax.device_get((total, levels))
    reading = Reading(
      start + len(inputs),
      *(float(x) for x in total),
      *levels[:3],
      float(levels[3]),
    )
    show(reading)
    yield reading


def _step(model):
  @jax.jit
  def step(params, state, inputs_L, targets_L, sizes_V):
    state, logits_1xLxV = model.apply({'params': params}, state, inputs_L[None])
    batch = {
      'targets': targets_L[None],
      'weights': jnp.ones((1, len(inputs_L)), jnp.float32),
      'bytes': sizes_V[targets_L][None],
    }
    total = loss.sums(logits_1xLxV, batch)
    return state, total, model_state.level_telemetry(state)

  return step


def summary(readings: list[Reading]) -> dict[str, float]:
  """`perplexity` a token, `bits_per_byte`, `nats`, `tokens`, `bytes`."""
  nats, scored, size = (
    math.fsum(getattr(r, name) for r in readings)
    for name in ('nats', 'scored', 'bytes')
  )
  return {
    'perplexity': math.exp(min(nats / max(scored, 1.0), 700.0)),
    'bits_per_byte': nats / math.log(2) / max(size, 1.0),
    'nats': nats / max(scored, 1.0),
    'tokens': scored,
    'bytes': size,
  }
