"""One model's days and nights, and what it knows after each of them."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch import sampling, trained
from nestax.launch.data.tokenizers import Tokenizer
from nestax.launch.evals import facts, pupil, recall
from nestax.launch.evals.sleepers import Evening, Sleeper
from nestax.models import language_model, stacking
from nestax.models.config import ModelConfig
from nestax.models.continuum import CMSConfig
from nestax.sleep import gate, grow, replay, texts
from nestax.sleep import reader as readers
from nestax.sleep.dream import DreamConfig
from nestax.sleep.reader import Reader, Said
from nestax.sleep.seed import SeedConfig
from nestax.sleep.texts import TextsConfig, Words
from nestax.sleep.tools import CycleConfig


@dataclasses.dataclass(frozen=True)
class Setting:
  """How days are read and nights are spent.

  Attributes:
    periods, optimizer, rate, blocks: of the levels.
    slots, rank: of the levels' expert slots.
    window: tokens that attention sees while a day is read; few, so that a
      fact is not just copied from its last statement.
    passes: how often a day states each fact, in eight wordings in turn.
    people: of a day; five facts each.
    past: texts of earlier days that a night may keep, at most.
    core: texts of the core set.
    tuning_rate: learning rate where MLPs are trained instead of a slot.
    dtype: of the model.
    tasks: to dream about a night, of `asked` facts each.
    asked: see `tasks`.
    how: the night.
  """

  periods: tuple[int, ...] = (32,)
  optimizer: str = 'muon'
  rate: float = 0.003
  blocks: str = 'all'
  slots: int = 5
  rank: int = 32
  window: int = 32
  passes: int = 16
  people: int = facts.PEOPLE
  past: int = 256
  core: int = 32
  tuning_rate: float = 1e-3
  dtype: str = 'float32'
  tasks: int = 2
  asked: int = 5
  how: CycleConfig = CycleConfig(
    seed=SeedConfig(
      steps=200, rows=16, rate=2e-2, divergence='forward_kl', every=8, say=12
    ),
    texts=TextsConfig(length=48, read=128, continued=0, free=0, kept=128),
    dream=DreamConfig(length=128, answer=48),
  )


PRETRAINED = Setting(
  rate=0.004,
  rank=16,
  window=64,
  tuning_rate=1e-4,
  dtype='bfloat16',
  how=CycleConfig(
    seed=SeedConfig(steps=200, rows=16, rate=5e-3, keep=2.0, every=8, say=16),
    texts=TextsConfig(length=64, read=128, continued=0, free=0, kept=192),
    dream=DreamConfig(length=160, answer=48),
  ),
)


def setting(model: str, changes: list[str]) -> Setting:
  """The setting of a pretrained model, or of the pupil, with changes.

  Args:
    model: path, or ''.
    changes: such as 'passes=8', 'seed.steps=400', 'texts.kept=0'.

  Raises:
    ValueError: for an unknown name, or a value that cannot be.
  """
  made = PRETRAINED if model else Setting()
  for change in changes:
    name, _, word = change.partition('=')
    part, _, field = name.rpartition('.')
    owner = getattr(made.how, part) if part else made
    if field not in {f.name for f in dataclasses.fields(owner)}:
      raise ValueError(f'--set={change}: no such setting')
    old = getattr(owner, field)
    if isinstance(old, tuple):
      value = tuple(int(x) for x in word.split('+'))
    else:
      value = type(old)(word)
    owner = dataclasses.replace(owner, **{field: value})
    if part:
      owner = dataclasses.replace(
        made, how=dataclasses.replace(made.how, **{part: owner})
      )
    made = owner
  return made


class World(NamedTuple):
  """A model that can sleep, as all cells begin with it."""

  name: str
  cfg: ModelConfig
  params: dict
  tokenizer: Tokenizer
  words: Words
  reader: Reader
  core: Said


def world(how: Setting, model: str, core: str, folder: pathlib.Path) -> World:
  """Loads the model or makes it, and its core set.

  Raises:
    ValueError: for a model without a core text, or one that is too short.
  """
  if model:
    if not core:
      raise ValueError('--core=TEXT.txt: a text that the model is to stay with')
    made = trained.load_pretrained(model)
    cfg, params, tokenizer = made.model.cfg, made.params, made.tokenizer
    ids = tokenizer.encode(sampling.read_prompt('', core))
    # from the middle: a book begins and ends with other things
    first = max(0, len(ids) // 2 - how.core * 64)
    ids = np.array(ids[first : first + how.core * 128], np.int32)
    if len(ids) < how.core * 128:
      raise ValueError(f'{core}: shorter than {how.core} times 128 tokens')
    rows = ids.reshape(how.core, 128)
  else:
    made = pupil.kept(folder / 'pupil.npz')
    cfg, params, tokenizer = made.cfg, made.params, made.tokenizer
    rows = made.core[: how.core]
  cms = CMSConfig(
    periods=how.periods,
    blocks=how.blocks,
    rate=how.rate,
    optimizer=how.optimizer,
  )
  cfg = dataclasses.replace(cfg, dtype=how.dtype)
  cfg, params = stacking.stack(cfg, params, 'groups', cms)
  cfg, params = grow.equip(cfg, params, how.slots, how.rank, jax.random.key(0))
  params = jax.tree.map(jnp.asarray, params)
  words = Words(tokenizer.bos, tokenizer.eos, tokenizer.pad)
  one = np.ones(len(rows), np.int32)
  return World(
    pathlib.Path(model).name or 'pupil',
    cfg,
    params,
    tokenizer,
    words,
    readers.of_model(cfg),
    Said(rows, one, one * rows.shape[1]),
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _call(cfg: ModelConfig, params, state, tokens_BxL):
  model = language_model.LanguageModel(cfg)
  return model.apply({'params': params}, state, tokens_BxL)[0]


def read(world: World, params, state, ids, window: int):
  """Reads a day; levels go on from `state`, if there is one.

  What does not fill the last call is left out.
  """
  state_ = state or language_model.init_state(world.cfg, 1, window)
  piece = 8 * world.cfg.stream.periods[-1]
  for start in range(0, len(ids) - piece + 1, piece):
    tokens = jnp.asarray(ids[None, start : start + piece])
    state_ = _call(world.cfg, params, state_, tokens)
  return jax.block_until_ready(state_)


@dataclasses.dataclass(frozen=True)
class Cloze:
  """A task to dream about: the day's statements, and their ends asked for.

  Nothing of the test's questions is in it.
  """

  facts: tuple
  tokenizer: Tokenizer
  name: str = 'statements'

  def context(self):
    said = ' '.join(fact.statement(1) for fact in self.facts)
    return [self.tokenizer.bos, *self.tokenizer.encode(said)]

  def questions(self):
    encode, pairs = self.tokenizer.encode, []
    for fact in self.facts:
      for wording in (0, 6):
        asked = fact.statement(wording).removesuffix(f' {fact.what}.')
        pairs.append((encode(asked), encode(f' {fact.what}')))
    return pairs


def live(
  world: World,
  how: Setting,
  sleeper: Sleeper,
  seed: int,
  days: int,
  say: Callable[[dict], None],
) -> list[dict]:
  """Reads and sleeps; gives a row for the first morning and for each night.

  In a row: `night`; `core`, nats a token of the slow weights; `chance`;
  `before`, recall of the day's facts by what the levels have written; `after`,
  recall of each day's facts so far in the morning; `dusk_core`; what the night
  counted; seconds by phase.
  """
  met = facts.days(seed, days, how.people)
  asked = [recall.ask(world.tokenizer, day) for day in met]
  params, state, past = world.params, None, []

  def right(params, context, day):
    return float(recall.right(world.reader, params, context, asked[day]).mean())

  def core(params, context=None):
    tokens, _, length = world.core
    return gate.loss(world.reader, params, context, tokens, length)

  rows = [
    {
      'night': 0,
      'core': core(params),
      'chance': asked[0].chance,
      'after': [right(params, None, day) for day in range(days)],
      'seconds': {},
    }
  ]
  say(rows[0])
  for night, day in enumerate(met, 1):
    text = facts.text(day, how.passes, seed * 1_000 + night)
    ids = np.array(world.tokenizer.encode(text), np.int32)
    row, seconds, start = {'night': night}, {}, time.perf_counter()
    if sleeper.reads:
      state = read(world, params, state, ids, how.window)
      seconds['read'] = time.perf_counter() - start
      context = readers.learned(state)
      row['before'] = right(params, context, night - 1)
      row['dusk_core'] = core(params, context)
    held = _gathered(world, how, ids)
    params, numbers, spent = sleeper.night(
      Evening(
        params,
        state,
        held,
        _past(past, how.past, seed),
        world.core,
        _tasks(world, how, day),
        night,
        jax.random.key(seed),
      )
    )
    past.append(held.read[0])
    if not sleeper.resets:
      context = readers.learned(state)
      row['held'] = [right(params, context, i) for i in range(night)]
    else:
      state = None
    row['core'] = core(params)
    row['after'] = [right(params, None, i) for i in range(night)]
    row |= {'numbers': numbers, 'seconds': seconds | spent}
    rows.append(row)
    say(row)
  return rows


def _gathered(world: World, how: Setting, ids) -> texts.Day:
  buffer = replay.Replay(len(ids))
  buffer.add(replay.Piece('reader', tuple(map(int, ids))))
  return texts.gather(how.how.texts, world.words.pad, ['reader'], buffer)


def _past(days: list[Said], most: int, seed: int) -> Said | None:
  """Some rows of earlier days, of all of them alike, always as many."""
  if not days or not most:
    return None
  rng = np.random.default_rng(seed)
  picked = [
    rng.choice(len(day.length_B), -(-most // len(days))) for day in days
  ]
  parts = [Said(*(x[i] for x in day)) for day, i in zip(days, picked)]
  return Said(*(np.concatenate(x)[:most] for x in zip(*parts)))


def _tasks(world: World, how: Setting, day) -> tuple[Cloze, ...]:
  groups = [
    day[i :: len(day) // how.asked][: how.asked] for i in range(how.tasks)
  ]
  return tuple(Cloze(tuple(group), world.tokenizer) for group in groups)
