"""Knowledge Seeding: a student's new slot learns what its teacher knows.

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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestax.sleep import distributions, imitate
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


def advantage(reward_B, group: int):
  """Reward less the mean of the group's others; groups are neighbours."""
  reward_PxG = reward_B.reshape(-1, group)
  others = (reward_PxG.sum(1, keepdims=True) - reward_PxG) / (group - 1)
  return (reward_PxG - others).reshape(-1)


def _mean(x_BxL, mask_BxL):
  return jnp.where(mask_BxL, x_BxL, 0.0).sum() / jnp.maximum(mask_BxL.sum(), 1)


def cut(key, texts: Said, group: int) -> Said:
  """Random prefixes of texts, each `group` times: what the student goes on.

  A prefix ends after the text's own prompt and before its last token.
  """
  last_B = jnp.maximum(texts.length_B, texts.start_B + 1)
  start_B = jax.random.randint(key, texts.start_B.shape, texts.start_B, last_B)
  texts = texts._replace(start_B=start_B)
  return jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), texts)


def completion(texts: Said):
  """What follows the prefixes, moved to the left, and its length."""
  L = texts.tokens_BxL.shape[1]
  place = jnp.arange(L)[None] + texts.start_B[:, None]
  tokens = jnp.take_along_axis(
    texts.tokens_BxL, jnp.minimum(place, L - 1), axis=1
  )
  return tokens, jnp.maximum(texts.length_B - texts.start_B, 0)


class Heard(NamedTuple):
  """What the teacher makes of an update's texts; constants of the gradient."""

  texts_BxLxV: jax.Array | None  # logits of its own texts
  said_BxLxV: jax.Array | None  # logits of the student's
  reward_B: jax.Array | None
  kept_BxLxV: jax.Array | None = None  # logits of the kept texts


class Programs(NamedTuple):
  """Sampling, scoring and update: one jitted, batched program each.

  `hear` alone is a function that asks them: of scoring, and of the reward.
  """

  speak: Callable  # (student, texts, key) -> (prefixes, said)
  hear: Callable  # (teacher, texts, prefixes, said, kept, context) -> Heard
  begin: Callable  # trained -> opt_state
  learn: Callable  # (trained, opt_state, student, texts, said, heard, kept)


def optimizer(cfg: SeedConfig) -> optax.GradientTransformation:
  """Clipped Adam; a step that is not finite changes nothing."""
  falling = optax.linear_schedule(cfg.rate, cfg.rate * cfg.last, cfg.steps - 1)
  rate = cfg.rate if cfg.last == 1 else falling
  return optax.apply_if_finite(
    optax.chain(optax.clip_by_global_norm(cfg.clip), optax.adam(rate)),
    max_consecutive_errors=2**30,
  )


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


def hearing(
  cfg: SeedConfig, reader: Reader, semantic: Callable = imitate.agreement
) -> Callable:
  """Makes `hear` for one model, whatever is trained.

  Its texts are read as many at a time as the teacher's, by one program.

  Args:
    cfg: the objective.
    reader: of teacher and student.
    semantic: `(teacher's logits, tokens, mask) -> r_sem`, `[B]`.
  """

  def score(params, context, tokens_BxL):
    return readers.scored(reader, params, context, tokens_BxL)

  @jax.jit
  def reward(logits_BxLxV, prefixes: Said, said: Said):
    mask = said.said_BxL[:, 1:]
    sem_B = semantic(logits_BxLxV, said.tokens_BxL[:, 1:], mask)
    mine, own_B = completion(said)
    wanted, their_B = completion(prefixes)
    if cfg.say:
      their_B = jnp.minimum(their_B, cfg.say)
    same_B = imitate.r_abs(mine, own_B, wanted, their_B, cfg.bound)
    return imitate.combine(sem_B, same_B, cfg.gamma)

  def hear(
    teacher: Side, texts: Said, prefixes, said, kept=None, context=None
  ) -> Heard:
    of_texts = of_said = of_kept = reward_B = None
    if cfg.alpha and (said is None or cfg.on_policy < 1):
      of_texts = score(*teacher, texts.tokens_BxL)
    if kept is not None:
      # by the slow weights as they were, and what the student has beside them
      of_kept = score(teacher.params, context, kept.tokens_BxL)
    if said is not None:
      # of each group one completion at a time
      each = said.tokens_BxL.reshape(-1, cfg.group, said.tokens_BxL.shape[1])
      parts = [score(*teacher, each[:, i]) for i in range(cfg.group)]
      of_said = jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:])
      reward_B = reward(of_said, prefixes, said)
    return Heard(of_texts, of_said, reward_B, of_kept)

  return hear


def programs(
  cfg: SeedConfig,
  reader: Reader,
  put: Callable[[Any, Any], Any],
  eos: int = -1,
  hear: Callable | None = None,
) -> Programs:
  """Makes them for one model and one kind of slot.

  Args:
    cfg: the objective.
    reader: of teacher and student.
    put: `(params, trained) -> params`: where what is trained belongs. All
      else is frozen, and is the teacher's own arrays.
    eos: id that ends a text; -1 if none does.
    hear: from `hearing`, for kinds of slots that share it; None for its own.
  """

  @jax.jit
  def speak(trained, student: Side, texts: Said, key):
    cut_key, key = jax.random.split(key)
    prefixes = cut(cut_key, texts, cfg.group)
    params = put(student.params, trained)
    said = readers.sample(
      reader,
      params,
      student.context,
      prefixes,
      key,
      cfg.temperature,
      eos,
      most=cfg.say,
    )
    return prefixes, said

  tx = optimizer(cfg)
  # kept, the unused argument says where: `learn` is not compiled again for it
  begin = jax.jit(tx.init, keep_unused=True)

  @jax.jit
  def learn(trained, opt_state, student: Side, texts, said, heard, kept=None):
    def objective(trained):
      own = student._replace(params=put(student.params, trained))
      return loss(cfg, reader, own, texts, said, heard, kept)

    grads, parts = jax.grad(objective, has_aux=True)(trained)
    updates, opt_state = tx.update(grads, opt_state, trained)
    parts['gradient'] = optax.global_norm(grads)
    return optax.apply_updates(trained, updates), opt_state, parts

  return Programs(speak, hear or hearing(cfg, reader), begin, learn)


def run(
  cfg: SeedConfig,
  made: Programs,
  teacher: Side,
  student: Side,
  trained,
  draw: Callable[[jax.Array], Said],
  key,
  tell: Callable[[int, dict], None] | None = None,
  keep: Callable[[jax.Array], Said] | None = None,
):
  """Teaches the student.

  Args:
    cfg: the objective.
    made: from `programs`.
    teacher: frozen.
    student: without what is trained.
    trained: its first value, such as `grow.take` gives.
    draw: `key -> Said`, the teacher's texts of one update, `cfg.rows` of them
      for each owner.
    key: of all that is random.
    tell: given the number of updates made and their numbers, float32 scalars
      on the device.
    keep: `key -> Said`, texts of one update whose distributions are to stay
      those of the teacher's slow weights; None for none. Rows are as long as
      those of `draw`, and as many of each owner.

  Returns:
    (trained, newest value of every number).
  """
  opt_state, numbers = made.begin(trained), {}
  for step in range(cfg.steps):
    texts_key, speak_key = jax.random.split(jax.random.fold_in(key, step))
    texts, prefixes, said, kept = draw(texts_key), None, None, None
    if cfg.keep and keep is not None:
      kept = keep(texts_key)
    if cfg.speaks and step % cfg.every == 0:
      prefixes, said = made.speak(trained, student, texts, speak_key)
    heard = made.hear(teacher, texts, prefixes, said, kept, student.context)
    trained, opt_state, parts = made.learn(
      trained, opt_state, student, texts, said, heard, kept
    )
    numbers |= parts
    if tell:
      tell(step + 1, parts)
  return trained, numbers
