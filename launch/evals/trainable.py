"""A problem and a model's config as what `sweep` and `serial` train."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from nestax.launch import loss
from nestax.launch.evals import problems, serial, sweep
from nestax.launch.evals.problems import Net, Problem
from nestax.launch.evals.training import Training
from nestax.models import language_model
from nestax.models.config import ModelConfig
from nestax.optim import labels, schedules

STILL = re.compile(r'.*(scale|bias|log_rate|mix|logit|active)')  # not decayed


def language(cfg: ModelConfig) -> Net:
  """A language model: the logits at every token."""
  model = language_model.LanguageModel(cfg)

  def init(key, tokens_BxL):
    return nn.unbox(model.init(key, None, tokens_BxL))['params']

  def apply(params, tokens_BxL):
    return model.apply({'params': params}, None, tokens_BxL)[1]

  return Net(init, apply)


def optimizer(shapes, training: Training) -> serial.Make:
  """AdamW as a function of its peak learning rate, and of the steps there are.

  The steps, `training.steps` unless given, may be traced; any others are taken
  for `training.trial`.
  """
  whole, short = (
    schedules.warmup_cosine(
      1.0, int(training.warmup * steps), steps, training.final
    )
    for steps in (training.steps, training.trial or training.steps)
  )

  def decayed(params):
    return jax.tree_util.tree_map_with_path(
      lambda keys, _: not STILL.fullmatch(labels.path_of(keys)), params
    )

  def make(rate, steps=training.steps):
    def schedule(count):
      is_whole = steps == training.steps
      return jnp.where(is_whole, whole(count), short(count))

    adamw = optax.adamw(
      schedule,
      0.9,
      training.b2,
      weight_decay=training.decay,
      mask=decayed(shapes),
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    return optax.chain(tx, optax.scale(rate))

  return make


def make_task(
  problem: Problem, cfg: ModelConfig, training: Training, seeds: int
) -> sweep.Task:
  """Draws all rows, and lays out what `sweep` trains."""
  net = (problem.net or language)(cfg)
  data = jax.tree.map(jnp.asarray, problems.data(problem, training, seeds))

  def init(data, seed):
    return net.init(jax.random.key(seed), data['train']['tokens'][:1, :1])

  def batch(data, seed, step, rows='train'):
    at = data[f'{rows} order'][seed, step]
    return jax.tree.map(lambda x: x[at], data[rows])

  def objective(params, batch):
    logits_BxLxV = net.apply(params, batch['tokens'])
    return loss.means(_sums(logits_BxLxV, batch))['loss']

  def one(params, batch):
    logits_BxLxV = net.apply(params, batch['tokens'])
    points, weight = problem.score(logits_BxLxV, batch)
    points = points if problem.less else 100.0 * points
    return points, weight, _sums(logits_BxLxV, batch)

  def evaluate(data, params, seed, step):
    del seed
    measure = functools.partial(_measure, functools.partial(one, params))
    if training.best or training.enough > 0:
      # every time, in one loop with the others: that is compiled once
      splits = 'valid', 'tests'
      found = measure(
        {(s, name): data[s][name] for s in splits for name in data[s]}
      )
      valid, tests = (
        {name: found[s, name] for name in data[s]} for s in splits
      )
    else:
      valid = measure(data['valid'])
      # at the end only; the step is the same in all runs of a sweep
      nothing = dict.fromkeys(data['tests'], (jnp.float32(jnp.nan),) * 2)
      tests = jax.lax.cond(
        step == training.steps, lambda: measure(data['tests']), lambda: nothing
      )
    sign = -1.0 if problem.less else 1.0
    count = len(valid)
    said = {'valid': sign * sum(score for score, _ in valid.values()) / count}
    said['loss'] = sum(loss for _, loss in valid.values()) / count
    for name, (score, nats) in tests.items():
      said |= {f'test {name}': score, f'loss {name}': nats}
    return said

  early = [
    functools.partial(batch, rows=f'early {i}')
    for i in range(len(problem.early))
  ]
  rest = {'early': early, 'share': problem.share}
  return sweep.Task(data, init, batch, objective, evaluate, 'valid', **rest)


def _sums(logits_BxLxV, batch) -> loss.Sums:
  nothing = jnp.zeros_like(batch['weights'])  # no text, no bytes
  return loss.sums(logits_BxLxV, batch | {'bytes': nothing})


def _measure(one, tests: dict) -> dict:
  """Score and loss of every test; those of one shape in one loop."""
  shapes = {}
  for name, batches in tests.items():
    shapes.setdefault(batches['tokens'].shape[1:], []).append(name)
  found = {}
  for names in shapes.values():
    batches = jax.tree.map(
      lambda *x: jnp.concatenate(x), *(tests[name] for name in names)
    )
    # one batch after another: all runs of a sweep hold theirs at once
    sums = jax.lax.map(one, batches)
    start = 0
    for name in names:
      stop = start + len(tests[name]['tokens'])
      points, weight, total = jax.tree.map(
        lambda x, start=start, stop=stop: x[start:stop].sum(), sums
      )
      found[name] = points / weight, loss.means(total)['loss']
      start = stop
  return found


def whole_rows(logits_BxLxV, batch):
  """Scores a row 1 if every prediction that has weight is right."""
  right_BxL = logits_BxLxV.argmax(-1) == batch['targets']
  counts_BxL = batch['weights'] > 0
  right_B = (right_BxL | ~counts_BxL).all(1)
  real_B = counts_BxL.any(1)
  return (right_B & real_B).sum().astype(jnp.float32), real_B.sum()


def tokens_right(logits_BxLxV, batch):
  """Scores every prediction that has weight."""
  right_BxL = logits_BxLxV.argmax(-1) == batch['targets']
  counts_BxL = batch['weights'] > 0
  return (right_BxL & counts_BxL).sum().astype(jnp.float32), counts_BxL.sum()
