"""The end of a night: is the new version good enough to wake up as?

A night is accepted if the core has not lost more than a margin, and what the
day brought has not got worse than the model without the night would be.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from nestax.sleep import reader as readers
from nestax.sleep.reader import Reader


@dataclasses.dataclass(frozen=True)
class GateConfig:
  """Margins, relative to the loss before the night.

  Attributes:
    core: greatest rise of the loss on the core set.
    day: least fall of the loss on the day's own content, against the same
      model with its fast levels reset and no night; negative allows a rise.
  """

  core: float = 0.01
  day: float = 0.0

  def __post_init__(self):
    if not 0 <= self.core < math.inf:
      raise ValueError(f'core={self.core}: 0 or more, and finite')
    if not -1 <= self.day < 1:
      raise ValueError(f'day={self.day}: from -1 to below 1')


@dataclasses.dataclass(frozen=True)
class Decision:
  """What the gate says; `reason` is for people."""

  accepted: bool
  reason: str


def _nats(reader: Reader, params, context, tokens_BxL, length_B):
  logits = readers.scored(reader, params, context, tokens_BxL)
  return _sums(logits, tokens_BxL, length_B)


@jax.jit
def _sums(logits_BxLxV, tokens_BxL, length_B):
  logs = jax.nn.log_softmax(logits_BxLxV)
  target_BxL = tokens_BxL[:, 1:, None]
  nats_BxL = -jnp.take_along_axis(logs, target_BxL, -1)[..., 0]
  place_1xL = jnp.arange(1, tokens_BxL.shape[1])[None]
  mask_BxL = place_1xL < length_B[:, None]
  # a text may hold what the model may not say, such as an unknown character:
  # NEVER's nats would drown all others; what is not finite still counts
  logit_BxL = jnp.take_along_axis(logits_BxLxV, target_BxL, -1)[..., 0]
  mask_BxL &= logit_BxL != readers.NEVER
  return jnp.where(mask_BxL, nats_BxL, 0.0).sum(1), mask_BxL.sum(1)


def row_nats(
  reader: Reader, params, context, tokens_NxL, length_N, rows: int = 8
):
  """Nats of each text after its first token, read `rows` at a time.

  Texts stand alone, levels frozen. Tokens that the reader may not say do not
  count. One program whatever their number: the last batch is filled with rows
  that do not count. With a context of owners, `rows` must be a multiple of
  theirs, and the texts in an order that gives each batch owner by owner.

  Returns:
    (their sums, the number of tokens that they are of), numpy `[N]`.
  """
  nats, counts = np.zeros(len(tokens_NxL)), np.zeros(len(tokens_NxL), int)
  for start in range(0, len(tokens_NxL), rows):
    part = np.asarray(tokens_NxL[start : start + rows])
    missing = rows - len(part)
    part = np.pad(part, ((0, missing), (0, 0)))
    length = np.pad(np.asarray(length_N[start : start + rows]), (0, missing))
    a, b = _nats(reader, params, context, jnp.asarray(part), length)
    nats[start : start + rows] = np.asarray(a)[: rows - missing]
    counts[start : start + rows] = np.asarray(b)[: rows - missing]
  return nats, counts


def loss(
  reader: Reader, params, context, tokens_NxL, length_N, rows: int = 8
) -> float:
  """Mean nats a token over a set of texts, see `row_nats`."""
  nats, counts = row_nats(reader, params, context, tokens_NxL, length_N, rows)
  return float(nats.sum() / max(counts.sum(), 1))


def decide(cfg: GateConfig, before: dict, after: dict) -> Decision:
  """Compares losses `core` and `day` before and after a night.

  `before['day']` is of the model as it would be without the night: fast
  levels reset. What is not finite is never accepted.
  """
  for name, value in after.items():
    if not math.isfinite(value):
      return Decision(False, f'rolled back: {name} is {value} after the night')
  rise = _rise(before['core'], after['core'])
  if rise > cfg.core:
    return Decision(
      False,
      f'rolled back: the core loss rose by {rise:.2%} ({before["core"]:.4f} to '
      f'{after["core"]:.4f}), more than {cfg.core:.2%}',
    )
  fall = -_rise(before['day'], after['day'])
  if fall < cfg.day:
    return Decision(
      False,
      f"rolled back: the loss on the day's content fell by {fall:.2%} "
      f'({before["day"]:.4f} to {after["day"]:.4f}), less than {cfg.day:.2%}',
    )
  return Decision(
    True,
    f"accepted: core loss {rise:+.2%}, loss on the day's content {-fall:+.2%}",
  )


def _rise(before: float, after: float) -> float:
  """Relative; none of texts in which no token counts, whose loss is 0."""
  return 0.0 if after == before else after / before - 1
