"""Long contexts, read in pieces: memory does not grow with their length."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from nestax.launch.evals import asking
from nestax.models import language_model, model_state
from nestax.models.config import ModelConfig
from nestax.sleep.reader import Rows

TAIL = 16  # tokens a call where fewer than a piece are left


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(cfg: ModelConfig, params, state, tokens_BxL):
  model = language_model.LanguageModel(cfg)
  return model.apply({'params': params}, state, tokens_BxL)[0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def alone(
  cfg: ModelConfig, window: int, state: model_state.ModelState
) -> model_state.ModelState:
  """The state, donated, before another context: levels alone remember."""
  return model_state.forget_mixers(cfg, state, window)


def read(
  cfg: ModelConfig,
  params,
  ids_BxL: np.ndarray,
  window: int,
  piece: int = 1024,
  state: model_state.ModelState | None = None,
  show: Callable[[int], None] = lambda tokens: None,
) -> model_state.ModelState:
  """Reads contexts of one length side by side; their levels learn.

  Args:
    cfg: the model.
    params: its parameters.
    ids_BxL: int32, on the host; a piece at a time goes to the device.
    window: tokens that attention can look back on.
    piece: tokens a call.
    state: to go on from, donated; None for fresh sequences.
    show: called with how many more tokens a row have been read.
  """
  B, L = ids_BxL.shape
  if state is None:
    state = model_state.init_state(cfg, B, window)
  start = 0
  # the rest in small pieces, then token by token: few programs for any length
  for width in (piece, min(piece, TAIL), 1):
    while L - start >= width:
      tokens = np.asarray(ids_BxL[:, start : start + width], np.int32)
      state = jax.block_until_ready(_read(cfg, params, state, tokens))
      show(width)
      start += width
  return state


def row(state: model_state.ModelState, index: int) -> Rows:
  """One sequence's state as one to ask from, see `asking.Asked`."""
  rows = asking.go_on(state)
  return jax.tree.map(lambda x: x[:, index : index + 1], rows)
