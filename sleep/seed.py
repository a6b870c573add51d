"""Knowledge Seeding: a student's new slot learns what its teacher knows.

Sleep section 2.3, item 4, by `objective.loss`: the teacher's texts of an update
are drawn, in some updates the student goes on from prefixes of them, the
teacher says what it makes of both, and the slot is moved. Samples are
constants of the gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestax.sleep import imitate
from nestax.sleep import reader as readers
from nestax.sleep.objective import Heard, SeedConfig, Side, loss
from nestax.sleep.reader import Reader, Said


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
    own = jax.random.fold_in(key, step)
    texts_key, speak_key, kept_key = jax.random.split(own, 3)
    texts, prefixes, said, kept = draw(texts_key), None, None, None
    if cfg.keep and keep is not None:
      kept = keep(kept_key)
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
