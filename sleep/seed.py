"""Knowledge Seeding: a student's new slot learns what its teacher knows.

Sleep section 2.3, item 4, with item 2's mixture, as a loss to be minimised:

    alpha [(1 - on_policy) F(teacher's y) + on_policy F(student's y)]
      - (1 - alpha) E[r(student's y)]

`F` is a divergence of the two next-token distributions, mean over tokens; `r`
is `sleep/imitate.py`'s reward, followed by REINFORCE with a leave-one-out
baseline over a group of completions of one prefix. Samples are constants.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestax.sleep import imitate
from nestax.sleep import reader as readers
from nestax.sleep.reader import Reader, Said

DIVERGENCES = ('forward_kl', 'reverse_kl', 'jsd')


@dataclasses.dataclass(frozen=True)
class SeedConfig:
  """How a night's consolidation is learned; papers leave all of it open.

  Attributes:
    steps: updates.
    rate: learning rate of Adam.
    clip: greatest norm of the gradient.
    rows: texts of the teacher in an update.
    group: completions of the student for each of them.
    alpha: share of the divergence against the reward.
    on_policy: share of the divergence that is taken on the student's texts.
    gamma: share of the semantic reward.
    bound: edit distance beyond which nothing is paid, a share of the length.
    divergence: 'reverse_kl' KL(student || teacher), 'forward_kl' or 'jsd'.
    temperature: of the student's completions.
  """

  steps: int = 100
  rate: float = 1e-3
  clip: float = 1.0
  rows: int = 8
  group: int = 4
  alpha: float = 0.5
  on_policy: float = 0.5
  gamma: float = 0.5
  bound: float = 0.5
  divergence: str = 'reverse_kl'
  temperature: float = 1.0

  def __post_init__(self):
    if self.divergence not in DIVERGENCES:
      raise ValueError(
        f'divergence={self.divergence!r}: one of {", ".join(DIVERGENCES)}'
      )
    for name in ('alpha', 'on_policy', 'gamma', 'bound'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f'{name}={getattr(self, name)}: from 0 to 1')
    for name in ('steps', 'rows', 'group'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: at least 1')
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


def divergence(name: str, teacher_BxLxV, student_BxLxV):
  """Of two next-token distributions given by logits, nats, `[B, L]`."""
  t = jax.nn.log_softmax(teacher_BxLxV)
  s = jax.nn.log_softmax(student_BxLxV)

  def kl(p, q):
    return (jnp.exp(p) * (p - q)).sum(-1)

  if name == 'forward_kl':
    return kl(t, s)
  if name == 'reverse_kl':
    return kl(s, t)
  middle = jnp.logaddexp(t, s) - jnp.log(2.0)
  return 0.5 * kl(t, middle) + 0.5 * kl(s, middle)


def advantage(reward_B, group: int):
  """Reward less the mean of the group's others; groups are neighbours."""
  reward_PxG = reward_B.reshape(-1, group)
  others = (reward_PxG.sum(1, keepdims=True) - reward_PxG) / (group - 1)
  return (reward_PxG - others).reshape(-1)


def log_chance(logits_BxLxV, tokens_BxL, mask_BxL):
  """Log-probability of each row's masked tokens together, `[B]`."""
  logs = jax.nn.log_softmax(logits_BxLxV)
  picked = jnp.take_along_axis(logs, tokens_BxL[..., None], -1)[..., 0]
  return jnp.where(mask_BxL, picked, 0.0).sum(1)


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


class Programs(NamedTuple):
  """Sampling, scoring and update: one jitted, batched program each."""

  speak: Callable  # (student, texts, key) -> (prefixes, said)
  hear: Callable  # (teacher, texts, prefixes, said) -> Heard
  learn: Callable  # (trained, opt_state, student, texts, said, heard) -> ...


def optimizer(cfg: SeedConfig) -> optax.GradientTransformation:
  """Clipped Adam; a step that is not finite changes nothing."""
  return optax.apply_if_finite(
    optax.chain(optax.clip_by_global_norm(cfg.clip), optax.adam(cfg.rate)),
    max_consecutive_errors=2**30,
  )


def loss(cfg: SeedConfig, reader: Reader, student: Side, texts, said, heard):
  """The objective of the module's docstring, and its parts.

  Returns:
    (loss, dict of float32 scalars `divergence`, `on_policy_divergence` and
    `reward`, those that are computed).
  """
  total, parts = 0.0, {}
  if cfg.alpha and cfg.on_policy < 1:
    own = readers.score(reader, *student, texts.tokens_BxL)
    apart = divergence(cfg.divergence, heard.texts_BxLxV, own)
    parts['divergence'] = _mean(apart, texts.said_BxL[:, 1:])
    total += cfg.alpha * (1 - cfg.on_policy) * parts['divergence']
  if not cfg.speaks:
    return total, parts
  own = readers.score(reader, *student, said.tokens_BxL)
  mask = said.said_BxL[:, 1:]
  if cfg.alpha and cfg.on_policy:
    apart = divergence(cfg.divergence, heard.said_BxLxV, own)
    parts['on_policy_divergence'] = _mean(apart, mask)
    total += cfg.alpha * cfg.on_policy * parts['on_policy_divergence']
  if cfg.alpha < 1:
    drawn = own / cfg.temperature  # the chance that it was drawn with
    log_B = log_chance(drawn, said.tokens_BxL[:, 1:], mask)
    paid_B = jax.lax.stop_gradient(advantage(heard.reward_B, cfg.group))
    total -= (1 - cfg.alpha) * (paid_B * log_B).mean()
    parts['reward'] = heard.reward_B.mean()
  return total, parts


def programs(
  cfg: SeedConfig,
  reader: Reader,
  put: Callable[[Any, Any], Any],
  eos: int = -1,
  semantic: Callable = imitate.agreement,
) -> Programs:
  """Compiles the three for one model and one kind of slot.

  Args:
    cfg: the objective.
    reader: of teacher and student.
    put: `(params, trained) -> params`: where what is trained belongs. All
      else is frozen, and is the teacher's own arrays.
    eos: id that ends a text; -1 if none does.
    semantic: `(teacher's logits, tokens, mask) -> r_sem`, `[B]`.
  """

  @jax.jit
  def speak(trained, student: Side, texts: Said, key):
    cut_key, key = jax.random.split(key)
    prefixes = cut(cut_key, texts, cfg.group)
    params = put(student.params, trained)
    said = readers.sample(
      reader, params, student.context, prefixes, key, cfg.temperature, eos
    )
    return prefixes, said

  @jax.jit
  def hear(teacher: Side, texts: Said, prefixes, said) -> Heard:
    of_texts = of_said = reward_B = None
    if cfg.alpha and cfg.on_policy < 1:
      of_texts = readers.score(reader, *teacher, texts.tokens_BxL)
    if cfg.speaks:
      of_said = readers.score(reader, *teacher, said.tokens_BxL)
      mask = said.said_BxL[:, 1:]
      sem_B = semantic(of_said, said.tokens_BxL[:, 1:], mask)
      same_B = imitate.r_abs(
        *completion(said), *completion(prefixes), cfg.bound
      )
      reward_B = imitate.combine(sem_B, same_B, cfg.gamma)
    return Heard(of_texts, of_said, reward_B)

  tx = optimizer(cfg)

  @jax.jit
  def learn(trained, opt_state, student: Side, texts, said, heard):
    def objective(trained):
      own = student._replace(params=put(student.params, trained))
      return loss(cfg, reader, own, texts, said, heard)

    grads, parts = jax.grad(objective, has_aux=True)(trained)
    updates, opt_state = tx.update(grads, opt_state, trained)
    parts['gradient'] = optax.global_norm(grads)
    return optax.apply_updates(trained, updates), opt_state, parts

  return Programs(speak, hear, learn)


def run(
  cfg: SeedConfig,
  made: Programs,
  teacher: Side,
  student: Side,
  trained,
  draw: Callable[[jax.Array], Said],
  key,
  tell: Callable[[int, dict], None] | None = None,
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

  Returns:
    (trained, numbers of the last update).
  """
  opt_state = optimizer(cfg).init(trained)
  parts = {}
  for step in range(cfg.steps):
    texts_key, speak_key = jax.random.split(jax.random.fold_in(key, step))
    texts, prefixes, said = draw(texts_key), None, None
    if cfg.speaks:
      prefixes, said = made.speak(trained, student, texts, speak_key)
    heard = made.hear(teacher, texts, prefixes, said)
    trained, opt_state, parts = made.learn(
      trained, opt_state, student, texts, said, heard
    )
    if tell:
      tell(step + 1, parts)
  return trained, parts
