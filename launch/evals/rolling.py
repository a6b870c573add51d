"""Log-probability of whole texts, several read side by side as streams."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch.evals import asking
from nestax.models import language_model, model_state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(model, params, state, inputs_BxL, targets_BxL, scored_BxL):
  state, logits_BxLxV = model.apply({'params': params}, state, inputs_BxL)
  logs_BxLxV = jax.nn.log_softmax(logits_BxLxV)
  log_BxL = jnp.take_along_axis(logs_BxLxV, targets_BxL[..., None], -1)[..., 0]
  return state, jnp.where(scored_BxL, log_BxL, 0.0).sum(1)


def logs(
  model: language_model.LanguageModel,
  params,
  texts: Sequence[asking.Tokens],
  window: int,
  rows: int = 8,
  show: Callable[[int], None] = lambda done: None,
) -> list[float]:
  """Sums the log-probability of every token but the first, nats.

  Levels learn and memories go on from the first token of a text to its last;
  memory is constant in its length.

  Args:
    model: the model.
    params: its parameters.
    texts: ids, the first of each a bos or whatever begins a text.
    window: tokens that attention can look back on.
    rows: texts at a time.
    show: called with how many more have been read.

  Raises:
    ValueError: naming the first text that has no first token.
  """
  asking.check(texts)
  order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
  found = [0.0] * len(texts)
  for at in range(0, len(order), rows):
    batch = order[at : at + rows]
    part = _batch(model, params, [texts[i] for i in batch], window, rows)
    for i, log in zip(batch, part):
      found[i] = float(log)
    show(len(batch))
  return found


def _batch(model, params, texts, window: int, rows: int) -> np.ndarray:
  longest = asking.size(max(map(len, texts)) - 1)
  piece = min(longest, max(1, asking.AT_ONCE // rows))
  width = -(-longest // piece) * piece
  tokens, length = asking.padded(texts, rows, width + 1)
  state = model_state.init_state(model.cfg, rows, min(window, width))
  total = np.zeros(rows, np.float64)
  for start in range(0, max(length) - 1, piece):
    inputs = tokens[:, start : start + piece]
    targets = tokens[:, start + 1 : start + piece + 1]
    place = start + 1 + np.arange(piece)
    scored = place[None] < length[:, None]
    state, sums = _step(model, params, state, inputs, targets, scored)
    total += np.asarray(sums, np.float64)
  return total[: len(texts)]
