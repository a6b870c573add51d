"""What a night's consolidation minimises: Knowledge Seeding's objective.

Sleep section 2.3, item 4, with item 2's mixture, as a loss to be minimised:

    alpha [(1 - on_policy) F(teacher's y) + on_policy F(student's y)]
      - (1 - alpha) E[r(student's y)] + keep F'(kept)

`F` is a divergence of the two next-token distributions, mean over tokens; `r`
is `sleep/imitate.py`'s reward, followed by REINFORCE with a leave-one-out
baseline over a group of completions of one prefix, as a mean over tokens too:
a sum would outweigh the divergence by the length. Samples are constants. `F'`
is on texts that the model said before the day, where the slot is to change
nothing: the papers have no such term, and without it a slot forgets whatever
its teacher forgot.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.sleep import distributions
from nestax.sleep import reader as readers
from nestax.sleep.reader import Reader, Said


@dataclasses.dataclass(frozen=True)
class SeedConfig:
  """How a night's consolidation is learned; papers leave all of it open.

  Attributes:
    steps: updates.
    rate: learning rate of Adam.
    last: that of the last update, as a share of the first's; it falls evenly.
    clip: greatest norm of the gradient.
    rows: texts of the teacher in an update.
    group: completions of the student for each of them.
    alpha: share of the divergence against the reward.
    on_policy: share of the divergence that is taken on the student's texts.
    gamma: share of the semantic reward.
    bound: edit distance beyond which nothing is paid, a share of the length.
    divergence: 'reverse_kl' KL(student || teacher), 'forward_kl' or 'jsd'.
    temperature: of the student's completions.
    every: the student speaks in each n-th update; the others follow the
      divergence on the teacher's texts and on those that are kept.
    say: tokens of a completion, at most; 0 for as many as there is room for.
    keep: weight of the divergence on texts that are kept, if there are any.
  """

  steps: int = 100
  rate: float = 1e-3
  last: float = 1.0
  clip: float = 1.0
  rows: int = 8
  group: int = 4
  alpha: float = 0.5
  on_policy: float = 0.5
  gamma: float = 0.5
  bound: float = 0.5
  divergence: str = 'reverse_kl'
  temperature: float = 1.0
  every: int = 1
  say: int = 0
  keep: float = 1.0

  def __post_init__(self):
    if self.divergence not in distributions.DIVERGENCES:
      names = ', '.join(distributions.DIVERGENCES)
      raise ValueError(f'divergence={self.divergence!r}: one of {names}')
    for name in ('alpha', 'on_policy', 'gamma', 'bound', 'last'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f'{name}={getattr(self, name)}: from 0 to 1')
    for name in ('steps', 'rows', 'group', 'every'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: at least 1')
    for name in ('say', 'keep'):
      if not 0 <= getattr(self, name) < float('inf'):
        raise ValueError(f'{name}={getattr(self, name)}: 0 or more, and finite')
    for name in ('rate', 'clip', 'temperature'):
      if not 0 < getattr(self, name) < float('inf'):
        raise ValueError(f'{name}={getattr(self, name)}: above 0 and finite')
    if self.alpha < 1 and self.group < 2:
      raise ValueError(
        'group=1: a leave-one-out baseline needs at least 2 completions of '
        'each prefix; or give alpha=1, which follows no reward'
      )

  @property
  def speaks(self) -> bool:
    """Whether the student's own texts are needed."""
    return self.alpha < 1 or self.on_policy > 0


class Side(NamedTuple):
  """The teacher, or the student: one model twice, or two.

  Arrays that are the same in both are there once: `params` are pytrees that
  share their leaves.
  """

  params: Any
  context: Any  # see `reader.Reader`


class Heard(NamedTuple):
  """What the teacher makes of an update's texts; constants of the gradient."""

  texts_BxLxV: jax.Array | None  # logits of its own texts
  said_BxLxV: jax.Array | None  # logits of the student's
  reward_B: jax.Array | None
  kept_BxLxV: jax.Array | None = None  # logits of the kept texts


def advantage(reward_B, group: int):
  """Reward less the mean of the group's others; groups are neighbours."""
  reward_PxG = reward_B.reshape(-1, group)
  others = (reward_PxG.sum(1, keepdims=True) - reward_PxG) / (group - 1)
  return (reward_PxG - others).reshape(-1)


def _mean(x_BxL, mask_BxL):
  return jnp.where(mask_BxL, x_BxL, 0.0).sum() / jnp.maximum(mask_BxL.sum(), 1)


def loss(
  cfg: SeedConfig, reader: Reader, student: Side, texts, said, heard, kept=None
):
  """The objective of the module's docstring, and its parts.

  Without anything said all of the first two terms is the divergence on the
  teacher's texts.

  Returns:
    (loss, dict of float32 scalars `divergence`, `on_policy_divergence`,
    `reward` and `kept`, those that are computed).
  """
  total, parts = 0.0, {}
  on_policy = 0.0 if said is None else cfg.on_policy
  own = _read(
    reader,
    student,
    texts=texts if cfg.alpha and on_policy < 1 else None,
    kept=kept,
    said=said,
  )
  if 'texts' in own:
    apart = distributions.divergence(
      cfg.divergence, heard.texts_BxLxV, own['texts']
    )
    parts['divergence'] = _mean(apart, texts.said_BxL[:, 1:])
    total += cfg.alpha * (1 - on_policy) * parts['divergence']
  if 'kept' in own:
    apart = distributions.divergence(
      cfg.divergence, heard.kept_BxLxV, own['kept']
    )
    parts['kept'] = _mean(apart, kept.said_BxL[:, 1:])
    total += cfg.keep * parts['kept']
  if said is None:
    return total, parts
  mask = said.said_BxL[:, 1:]
  if cfg.alpha and on_policy:
    apart = distributions.divergence(
      cfg.divergence, heard.said_BxLxV, own['said']
    )
    parts['on_policy_divergence'] = _mean(apart, mask)
    total += cfg.alpha * on_policy * parts['on_policy_divergence']
  if cfg.alpha < 1:
    drawn = own['said'] / cfg.temperature  # the chance that it was drawn with
    log_B = distributions.log_chance(drawn, said.tokens_BxL[:, 1:], mask)
    paid_B = jax.lax.stop_gradient(advantage(heard.reward_B, cfg.group))
    gain = (paid_B * log_B).sum() / jnp.maximum(mask.sum(), 1)
    total -= (1 - cfg.alpha) * gain
    parts['reward'] = heard.reward_B.mean()
  return total, parts


def _read(reader: Reader, side: Side, **texts: Said | None):
  """Logits of texts by name, those that are None left out, read as one batch.

  One model to compile instead of one for each name. All are of one length and
  of the same owners, whose rows stay together: in as many blocks as divide
  every number of rows, and so at least as fine as the owners.
  """
  texts = {name: x.tokens_BxL for name, x in texts.items() if x is not None}
  if len(texts) < 2:
    return {n: readers.score(reader, *side, x) for n, x in texts.items()}
  G = math.gcd(*(len(x) for x in texts.values()))
  blocks = [x.reshape(G, -1, x.shape[1]) for x in texts.values()]
  tokens_GxRxL = jnp.concatenate(blocks, 1)
  R, L = tokens_GxRxL.shape[1:]
  logits = readers.score(reader, *side, tokens_GxRxL.reshape(G * R, L))
  ends = np.cumsum([x.shape[1] for x in blocks])[:-1]
  parts = jnp.split(logits.reshape(G, R, *logits.shape[1:]), ends, axis=1)
  return {
    name: x.reshape(-1, *logits.shape[1:]) for name, x in zip(texts, parts)
  }
