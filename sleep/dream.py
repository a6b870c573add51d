"""Dreaming: a model writes its own lessons and keeps those that help it.

Sleep section 2.4, after SEAL. For a task, dreams are sampled after its context
while every level activates one random expert more; those with the largest
gradients are kept, and some random ones; each is learned by a slot of its own;
it is paid 1 if that model does better on the task; what was paid is then
imitated (ReST-EM). All dreams of a task are one batch throughout: the isolated
copies differ in one slot only, and all else is there once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestax.models.config import ModelConfig
from nestax.sleep import reader as readers
from nestax.sleep import seed
from nestax.sleep.reader import Reader, Said

Tokens = Sequence[int]


class Task(Protocol):
  """What a user writes to have a model dream about something."""

  def context(self) -> Tokens:
    """What is read before a dream."""

  def questions(self) -> Sequence[tuple[Tokens, Tokens]]:
    """Pairs of a prompt and its right answer: a dream must help with them."""


class TaskError(ValueError):
  """A task does not fit the rows that dreams are made in."""


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
  study: Callable  # (params, context, trained, opt_state, dreams, paid_B)


class Result(NamedTuple):
  """What became of one task in one round."""

  before: float  # score without any dream
  scores: np.ndarray  # with each dream that was kept
  chosen: np.ndarray  # which of the dreams those were
  rewards: np.ndarray  # 0 or 1 each


class Dreamt(NamedTuple):
  """What a night's dreams came to."""

  trained: Any  # what was learned from those that were paid
  rounds: tuple[list[Result], ...]  # each of them task by task
  after: tuple[float, ...]  # each task's score with `trained`


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


def select(key, omega_m, top: int, random: int):
  """Indices of the `top` largest and of `random` others, in no order."""
  order_m = jnp.argsort(-omega_m)
  rest = jax.random.permutation(key, order_m[top:])
  return jnp.concatenate([order_m[:top], rest[:random]])


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
  log_B = seed.log_chance(logits, texts.tokens_BxL[:, 1:], mask)
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

  @jax.jit
  def examine(params, context, trained, questions: Said, count):
    def one(own):
      scores_Q = score(reader, put(params, own), context, questions)
      asked_Q = jnp.arange(scores_Q.shape[0]) < count
      return jnp.where(asked_Q, scores_Q, 0.0).sum() / count

    return jax.vmap(one)(trained)

  outer = optimizer(cfg)

  @jax.jit
  def study(params, context, trained, opt_state, dreams: Said, paid_B):
    def objective(trained):
      own = put(params, trained)
      score_B = row_scores(reader, own, context, dreams)
      return -(paid_B * score_B).sum() / jnp.maximum(paid_B.sum(), 1.0)

    grads = jax.grad(objective)(trained)
    updates, opt_state = outer.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state

  return Programs(dream, weigh, adapt, examine, study)


def optimizer(cfg: DreamConfig) -> optax.GradientTransformation:
  """Of the imitation of what was paid."""
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(cfg.rate))


def prompt_row(task: Task, length: int) -> Said:
  """A task's context as one row with room for a dream.

  Raises:
    TaskError: if there is no context, or no room.
  """
  tokens = list(task.context())
  if not 1 <= len(tokens) < length:
    raise TaskError(
      f'{_name(task)}: a context of {len(tokens)} tokens; from 1 to '
      f'{length - 1} leave room for a dream in rows of length={length}'
    )
  row = np.zeros((1, length), np.int32)
  row[0, : len(tokens)] = tokens
  start = jnp.array([len(tokens)], jnp.int32)
  return Said(jnp.asarray(row), start, start)


def question_rows(task: Task, answer: int, rows: int) -> tuple[Said, int]:
  """A task's questions as rows, and how many there are.

  Args:
    task: with 1 to `rows` questions.
    answer: tokens a row.
    rows: how many to make, the last ones empty.

  Raises:
    TaskError: if there are none, or one that is empty or too long.
  """
  pairs = [(list(q), list(a)) for q, a in task.questions()]
  if not pairs:
    raise TaskError(f'{_name(task)}: no questions, so no dream could help')
  tokens = np.zeros((rows, answer), np.int32)
  start, length = np.ones(rows, np.int32), np.ones(rows, np.int32)
  for i, (q, a) in enumerate(pairs):
    if not q or not a or len(q) + len(a) > answer:
      raise TaskError(
        f'{_name(task)}: question {i} has {len(q)} and its answer {len(a)} '
        f'tokens; at least one each, and together at most answer={answer}'
      )
    tokens[i, : len(q) + len(a)] = q + a
    start[i], length[i] = len(q), len(q) + len(a)
  return Said(*map(jnp.asarray, (tokens, start, length))), len(pairs)


def prepare(cfg: DreamConfig, tasks: Sequence[Task]):
  """Each task's prompt, its questions as rows, and how many there are.

  Raises:
    TaskError: for no tasks, or one that does not fit.
  """
  if not tasks:
    raise TaskError('no tasks to dream about')
  most = max(len(task.questions()) for task in tasks)
  return [
    (prompt_row(t, cfg.length), *question_rows(t, cfg.answer, most))
    for t in tasks
  ]


def _name(task) -> str:
  return getattr(task, 'name', type(task).__name__)


def run(
  cfg: DreamConfig,
  made: Programs,
  params,
  context,
  trained,
  tasks: Sequence[Task],
  key,
  tell: Callable[[int, int, Result], None] | None = None,
):
  """Dreams about every task, and imitates the dreams that helped.

  Args:
    cfg: how to dream.
    made: from `programs`.
    params: of the model, without what is trained.
    context: what the rows know, of one owner, see `reader.Reader`; or None.
    trained: first value of what is trained.
    tasks: what to dream about.
    key: of all that is random.
    tell: given the round, the task's number and its result.

  Returns:
    Dreamt. Without a single reward `trained` is as it was.

  Raises:
    TaskError: for no tasks, or one that does not fit, before anything is done.
  """
  ready = prepare(cfg, tasks)
  history = []
  for number in range(cfg.rounds):
    kept, paid, results = [], [], []
    for i, (prompt, questions, count) in enumerate(ready):
      own = jax.random.fold_in(jax.random.fold_in(key, number), i)
      dreams, result = _one_task(
        cfg, made, (params, context, trained), prompt, questions, count, own
      )
      kept.append(dreams)
      paid.append(result.rewards)
      results.append(result)
      if tell:
        tell(number, i, result)
    history.append(results)
    paid = np.concatenate(paid)
    if paid.any():
      texts = jax.tree.map(lambda *x: jnp.concatenate(x), *kept)
      trained = _imitate(cfg, made, params, context, trained, texts, paid)
  own = jax.tree.map(lambda x: x[None], trained)
  after = tuple(
    float(made.examine(params, context, own, questions, count)[0])
    for _, questions, count in ready
  )
  return Dreamt(trained, tuple(history), after)


def _one_task(cfg, made, model, prompt, questions, count, key):
  params, context, trained = model
  dream_key, select_key = jax.random.split(key)
  dreams = made.dream(params, context, trained, prompt, dream_key)
  omega_m = made.weigh(params, context, trained, dreams)
  chosen = select(select_key, omega_m, cfg.top, cfg.random)
  dreams = jax.tree.map(lambda x: x[chosen], dreams)
  copies = made.adapt(params, context, trained, dreams)
  awake = jax.tree.map(lambda x: x[None], trained)
  before = made.examine(params, context, awake, questions, count)[0]
  after = np.asarray(made.examine(params, context, copies, questions, count))
  # a copy whose score is not a number has not helped
  rewards = (after > float(before) + cfg.margin).astype(np.float32)
  return dreams, Result(float(before), after, np.asarray(chosen), rewards)


def _imitate(cfg, made, params, context, trained, texts, paid):
  """Fine-tunes on the paid dreams after their contexts (ReST-EM)."""
  opt_state = optimizer(cfg).init(trained)
  paid_B = jnp.asarray(paid)
  for _ in range(cfg.steps):
    trained, opt_state = made.study(
      params, context, trained, opt_state, texts, paid_B
    )
  return trained
