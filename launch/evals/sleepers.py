"""What a model may do with its day at night: sleep, or what else there is.

All get the same texts of the day, as many updates and as many rows in each.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nestax.models.config import ModelConfig
from nestax.sleep import cycle, seed, texts
from nestax.sleep import reader as readers
from nestax.sleep import tools as tools_
from nestax.sleep.gate import GateConfig
from nestax.sleep.objective import Side
from nestax.sleep.reader import Said
from nestax.sleep.texts import Day, Words
from nestax.sleep.tools import CycleConfig

KERNELS = ('gate', 'up', 'down')
NEVER_ROLLED_BACK = GateConfig(core=1e9, day=-1.0 + 1e-9)


class Evening(NamedTuple):
  """What a night begins with."""

  params: Any
  state: Any  # ModelState, levels as they have learned; None if unread
  day: Day
  past: Said | None  # texts of earlier days
  core: Said
  tasks: tuple  # to dream about
  number: int  # of the night, from 1
  key: Any


class Sleeper(NamedTuple):
  """One way to spend a night.

  Attributes:
    night: `Evening -> (params, numbers, seconds by phase)`.
    reads: whether its levels read the day before.
    resets: whether they are reset in the morning.
  """

  night: Callable[[Evening], tuple[Any, dict, dict]]
  reads: bool = True
  resets: bool = True


def variants(how: CycleConfig) -> dict[str, CycleConfig]:
  """A night as given, and without one part each."""
  seeds, dreams = how.seed, how.dream

  def change(part, **values):
    new = dataclasses.replace(getattr(how, part), **values)
    return dataclasses.replace(how, **{part: new})

  return {
    'sleep': how,
    'sleep and dreams': how,
    'dreams, no selection': change(
      'dream', top=0, random=dreams.top + dreams.random
    ),
    'no imitation': change('seed', alpha=1.0),
    'imitation alone': change('seed', alpha=0.0),
    'no own texts': change('seed', alpha=1.0, on_policy=0.0),
    'reward ten times': change(
      'seed', alpha=seeds.alpha / (10 - 9 * seeds.alpha)
    ),
    'nothing kept': change('seed', keep=0.0),
  }


NAMES = (
  *variants(CycleConfig()),
  'no expansion',
  'fine-tuning',
  'fine-tuning, replay',
  'no sleep',
)


def make(
  name: str, cfg: ModelConfig, how: CycleConfig, words: Words, rate: float
) -> Sleeper:
  """Makes one of NAMES; its programs are compiled once.

  Args:
    name: of NAMES.
    cfg: the model.
    how: the night.
    words: ids with a meaning.
    rate: learning rate where MLPs are trained instead of a slot.

  Raises:
    ValueError: for another name.
  """
  how = dataclasses.replace(how, gate=NEVER_ROLLED_BACK)
  if name == 'no sleep':
    return Sleeper(lambda evening: (evening.params, {}, {}), resets=False)
  if name in variants(how):
    dreams = 'dreams' in name
    return Sleeper(_sleep(cfg, variants(how)[name], words, dreams))
  mlps = dataclasses.replace(how, seed=dataclasses.replace(how.seed, rate=rate))
  if name == 'no expansion':
    return Sleeper(_distil(cfg, mlps, words))
  if name in ('fine-tuning', 'fine-tuning, replay'):
    return Sleeper(_tune(cfg, mlps, 'replay' in name), reads=False)
  raise ValueError(f'{name!r} is not one of {"; ".join(NAMES)}')


def _sleep(cfg: ModelConfig, how: CycleConfig, words: Words, dreams: bool):
  tools = tools_.of_model(cfg, how, words)

  def night(evening: Evening):
    slept = cycle.night(
      tools,
      evening.params,
      evening.state,
      evening.day,
      evening.core,
      evening.number,
      evening.key,
      tasks=evening.tasks if dreams else (),
      past=evening.past,
    )
    return slept.params, slept.metrics, slept.seconds

  return night


def _take(cfg: ModelConfig, params):
  """The MLPs of the blocks that learn."""
  return {
    f'level_{i}': {
      name: params['blocks'][f'level_{i}'][name] for name in KERNELS
    }
    for i in range(len(cfg.schedule.levels))
  }


def _put(params, trained):
  blocks = dict(params['blocks'])
  for level, kernels in trained.items():
    blocks[level] = blocks[level] | kernels
  return params | {'blocks': blocks}


def _distil(cfg: ModelConfig, how: CycleConfig, words: Words):
  """Distillation without growth: the MLPs take up what the levels hold."""
  reader = readers.of_model(cfg)
  made = seed.programs(how.seed, reader, _put, words.eos)
  speak = texts.speaker(how.texts, reader, words)

  def night(evening: Evening):
    start = time.perf_counter()
    params = evening.params
    own = jax.random.fold_in(evening.key, evening.number)
    made_key, kept_key, key = jax.random.split(own, 3)
    context = readers.learned(evening.state)
    said = texts.make(
      how.texts,
      words.bos,
      functools.partial(speak, params, context),
      evening.day,
      made_key,
    )
    kept = texts.kept(
      how.texts,
      words.bos,
      functools.partial(speak, params, None),
      kept_key,
      evening.past,
    )
    trained, numbers = seed.run(
      how.seed,
      made,
      Side(params, context),
      Side(params, None),
      _take(cfg, params),
      texts.drawer(said, 1, how.seed.rows),
      key,
      keep=kept and texts.drawer(kept, 1, how.seed.rows),
    )
    trained = jax.block_until_ready(trained)
    numbers = {f'{name}_0': float(x) for name, x in numbers.items()}
    seconds = time.perf_counter() - start
    phase = f'consolidate every {cfg.stream.periods[0]}'
    return _put(params, trained), numbers, {phase: seconds}

  return night


def _tune(cfg: ModelConfig, how: CycleConfig, replay: bool):
  """Next-token loss on the day's texts, half of them earlier ones if asked."""
  reader, tx = readers.of_model(cfg), seed.optimizer(how.seed)

  @jax.jit
  def learn(params, trained, opt_state, rows: Said):
    def loss(trained):
      logits = readers.score(reader, _put(params, trained), None, rows[0])
      nats_BxL = optax.softmax_cross_entropy_with_integer_labels(
        logits, rows.tokens_BxL[:, 1:]
      )
      mask_BxL = rows.said_BxL[:, 1:]
      return jnp.where(mask_BxL, nats_BxL, 0.0).sum() / mask_BxL.sum()

    nats, grads = jax.value_and_grad(loss)(trained)
    updates, opt_state = tx.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, nats

  def night(evening: Evening):
    start = time.perf_counter()
    count, past = how.seed.rows, evening.past if replay else None
    now = count - count // 2 if past else count
    draw = texts.drawer(_rows(evening.day.read[0]), 1, now)
    again = past and texts.drawer(_rows(past), 1, count // 2)
    trained = _take(cfg, evening.params)
    opt_state = tx.init(trained)
    for step in range(how.seed.steps):
      key = jax.random.fold_in(evening.key, step)
      rows = draw(key)
      if past:
        rows = Said(*(jnp.concatenate(x) for x in zip(rows, again(key))))
      trained, opt_state, nats = learn(evening.params, trained, opt_state, rows)
    trained = jax.block_until_ready(trained)
    seconds = time.perf_counter() - start
    return (
      _put(evening.params, trained),
      {'nats': float(nats)},
      {'fine-tuning': seconds},
    )

  return night


def _rows(said: Said) -> Said:
  return Said(*map(jnp.asarray, said))
