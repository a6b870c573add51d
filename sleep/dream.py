"""Dreaming: a model writes its own lessons and keeps those that help it.

Sleep section 2.4, after SEAL. For a task, dreams are sampled after its context
while every level activates one random expert more; those with the largest
gradients are kept, and some random ones; each is learned by a slot of its own;
it is paid 1 if that model does better on the task; what was paid is then
imitated (ReST-EM). All dreams of a task are one batch throughout: the isolated
copies differ in one slot only, and all else is there once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestax.models.config import ModelConfig
from nestax.sleep import distributions, seed
from nestax.sleep import reader as readers
from nestax.sleep.reader import Reader, Said


@dataclasses.dataclass(frozen=True)
class DreamConfig:
  """How a model dreams.

  Attributes:
    dreams: sampled for each task and round.
    top: kept for the norm of their gradients on the slot.
    random: kept of the others, at random.
    length: tokens of a context and a dream together.
    answer: tokens of a question and its answer together.
    temperature: of the dreams.
    inner_steps: updates of an isolated copy on its dream.
    inner_rate: learning rate of those.
    margin: least gain in the task's score, for a reward.
    rounds: of dreaming and imitating what was paid.
    steps: updates of a round's imitation.
    rate: learning rate of those.
  """

  dreams: int = 16
  top: int = 3
  random: int = 1
  length: int = 128
  answer: int = 64
  temperature: float = 1.0
  inner_steps: int = 8
  inner_rate: float = 1e-2
  margin: float = 0.0
  rounds: int = 1
  steps: int = 8
  rate: float = 1e-3

  def __post_init__(self):
    for name in ('dreams', 'inner_steps', 'rounds', 'steps'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: at least 1')
    for name in ('top', 'random', 'margin'):
      if not getattr(self, name) >= 0:
        raise ValueError(f'{name}={getattr(self, name)}: 0 or more')
    if not 1 <= self.kept <= self.dreams:
      raise ValueError(
        f'top={self.top} and random={self.random} dreams to keep of '
        f'{self.dreams}: together from 1 to all of them'
      )
    for name in ('length', 'answer'):
      if getattr(self, name) < 2:
        raise ValueError(f'{name}={getattr(self, name)}: at least 2')
    for name in ('temperature', 'inner_rate', 'rate'):
      if not 0 < getattr(self, name) < float('inf'):
        raise ValueError(f'{name}={getattr(self, name)}: above 0 and finite')

  @property
  def kept(self) -> int:
    return self.top + self.random


class Programs(NamedTuple):
  """The steps of a night's dreaming, one jitted, batched program each."""

  dream: Callable  # (params, context, trained, prompt, key) -> Said
  weigh: Callable  # (params, context, trained, dreams) -> omega
  adapt: Callable  # (params, context, trained, dreams) -> trained, batched
  examine: Callable  # (params, context, trained, batched, questions) -> scores
  begin: Callable  # trained -> opt_state
  study: Callable  # (params, context, trained, opt_state, dreams, paid_B)


def random_expert(cfg: ModelConfig, params, key):
  """Activates one random expert more in every level of every block.

  Drawn among all slots that hold something. One that is masked counts with its
  own weight; one that is active already counts twice, as there is no sparse
  router to leave it out. Where all slots are empty nothing changes.
  """
  blocks = dict(params['blocks'])
  for i in range(len(cfg.schedule.levels)):
    level = blocks[f'level_{i}']
    slots = level['slots']
    holds_NxS = jnp.any(slots['b'] != 0, axis=(2, 3))
    draws_NxS = jax.random.gumbel(jax.random.fold_in(key, i), holds_NxS.shape)
    best_N = jnp.where(holds_NxS, draws_NxS, -jnp.inf).argmax(1)
    chosen_NxS = jax.nn.one_hot(best_N, holds_NxS.shape[1], dtype=bool)
    chosen_NxS = chosen_NxS & holds_NxS
    twice_NxS = chosen_NxS & (slots['active'] > 0)
    active = jnp.where(chosen_NxS, 1.0, slots['active'])
    b = jnp.where(twice_NxS[..., None, None], 2 * slots['b'], slots['b'])
    blocks[f'level_{i}'] = level | {'slots': slots | {'active': active, 'b': b}}
  return params | {'blocks': blocks}


def alone(texts: Said, bos: int) -> Said:
  """Texts without their prompts: a beginning and what was said."""
  tokens_BxL, length_B = seed.completion(texts)
  first_Bx1 = jnp.full((tokens_BxL.shape[0], 1), bos, tokens_BxL.dtype)
  tokens_BxL = jnp.concatenate([first_Bx1, tokens_BxL[:, :-1]], 1)
  return Said(tokens_BxL, jnp.ones_like(length_B), length_B + 1)


def row_scores(reader: Reader, params, context, texts: Said):
  """Mean log-probability of what each row says, `[B]`; 0 if it says nothing."""
  logits = readers.score(reader, params, context, texts.tokens_BxL)
  mask = texts.said_BxL[:, 1:]
  log_B = distributions.log_chance(logits, texts.tokens_BxL[:, 1:], mask)
  return log_B / jnp.maximum(mask.sum(1), 1)


def programs(
  cfg: DreamConfig,
  reader: Reader,
  put: Callable[[Any, Any], Any],
  disturb: Callable[[Any, jax.Array], Any],
  bos: int,
  eos: int = -1,
  score: Callable = row_scores,
) -> Programs:
  """Compiles the steps for one model and one kind of slot.

  Args:
    cfg: how to dream.
    reader: of the model.
    put: `(params, trained) -> params`; all else is frozen.
    disturb: `(params, key) -> params` that a dream is sampled with, such as
      `random_expert`.
    bos: id that a text begins with.
    eos: id that ends a dream; -1 if none does.
    score: `(reader, params, context, questions) -> [Q]`, higher is better.
  """

  @jax.jit
  def dream(params, context, trained, prompt: Said, key) -> Said:
    own = put(params, trained)

    def one(key):
      expert_key, key = jax.random.split(key)
      other = disturb(own, expert_key)
      return readers.sample(
        reader, other, context, prompt, key, cfg.temperature, eos
      )

    dreams = jax.vmap(one)(jax.random.split(key, cfg.dreams))
    return jax.tree.map(lambda x: x[:, 0], dreams)

  @jax.jit
  def examine(params, context, trained, questions: Said, count):
    def one(own):
      scores_Q = score(reader, put(params, own), context, questions)
      asked_Q = jnp.arange(scores_Q.shape[0]) < count
      return jnp.where(asked_Q, scores_Q, 0.0).sum() / count

    return jax.vmap(one)(trained)

  weigh, adapt = _lessons(cfg, reader, put, bos)
  return Programs(dream, weigh, adapt, examine, *_studies(cfg, reader, put))


def _lessons(cfg: DreamConfig, reader: Reader, put: Callable, bos: int):
  """Makes `weigh` and `adapt`: each dream a text that is learned alone."""

  def lesson(trained, params, context, text: Said):
    texts = jax.tree.map(lambda x: x[None], text)
    return -row_scores(reader, put(params, trained), context, texts)[0]

  @jax.jit
  def weigh(params, context, trained, dreams: Said):
    def one(text):
      grads = jax.grad(lesson)(trained, params, context, text)
      return optax.global_norm(grads)

    return jax.vmap(one)(alone(dreams, bos))

  inner = optax.adam(cfg.inner_rate)

  @jax.jit
  def adapt(params, context, trained, dreams: Said):
    def one(text):
      def step(carry, _):
        own, opt_state = carry
        grads = jax.grad(lesson)(own, params, context, text)
        updates, opt_state = inner.update(grads, opt_state, own)
        return (optax.apply_updates(own, updates), opt_state), None

      carry = trained, inner.init(trained)
      (own, _), _ = jax.lax.scan(step, carry, None, length=cfg.inner_steps)
      return own

    return jax.vmap(one)(alone(dreams, bos))

  return weigh, adapt


def _studies(cfg: DreamConfig, reader: Reader, put: Callable):
  """Makes `begin` and `study`: updates on what was paid, after its context."""
  outer = optimizer(cfg)
  # kept, the unused argument says where: `study` is not compiled again for it
  begin = jax.jit(outer.init, keep_unused=True)

  @jax.jit
  def study(params, context, trained, opt_state, dreams: Said, paid_B):
    def objective(trained):
      own = put(params, trained)
      score_B = row_scores(reader, own, context, dreams)
      return -(paid_B * score_B).sum() / jnp.maximum(paid_B.sum(), 1.0)

    grads = jax.grad(objective)(trained)
    updates, opt_state = outer.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state

  return begin, study


def optimizer(cfg: DreamConfig) -> optax.GradientTransformation:
  """Of the imitation of what was paid."""
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(cfg.rate))
