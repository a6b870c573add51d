"""One model's days and nights, and what it knows after each of them."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch import recall, rehearsal, sleep_options, trained
from nestax.launch.data.tokenizers import Tokenizer
from nestax.launch.evals import facts, pupil
from nestax.launch.evals.sleepers import Evening, Sleeper
from nestax.models import language_model, model_state, stacking
from nestax.models.config import ModelConfig
from nestax.models.continuum import CMSConfig
from nestax.sleep import gate, grow, replay, texts
from nestax.sleep import reader as readers
from nestax.sleep.dream import DreamConfig
from nestax.sleep.objective import SeedConfig
from nestax.sleep.reader import Reader, Said
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
    rehearsed: texts of what the model knew before all days that a night may
      keep; none of them is of the core set.
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
  past: int = 384
  rehearsed: int = 256
  core: int = 32
  tuning_rate: float = 1e-3
  dtype: str = 'float32'
  tasks: int = 2
  asked: int = 5
  how: CycleConfig = CycleConfig(
    seed=SeedConfig(
      steps=120,
      rows=16,
      rate=2e-2,
      last=0.1,
      keep=2.0,
      divergence='forward_kl',
      every=12,
      say=12,
    ),
    texts=TextsConfig(length=48, read=128, continued=0, free=0, kept=64),
    dream=DreamConfig(length=128, answer=48),
  )


PRETRAINED = Setting(
  optimizer='sgd',
  rate=0.2,
  passes=32,
  rank=sleep_options.PRETRAINED.rank,
  window=64,
  past=384,
  rehearsed=512,
  tuning_rate=1e-4,
  dtype='bfloat16',
  how=dataclasses.replace(
    sleep_options.LARGE,
    dream=dataclasses.replace(sleep_options.LARGE.dream, length=160, answer=48),
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
  """A model that can sleep, as all cells begin with it.

  Attributes:
    name: of its file.
    texts: names of the files of `core`, `rehearsed` and `other`.
    cfg, params, tokenizer, words, reader: the model.
    core: the core set.
    rehearsed: texts of the same kind, to take some from each night.
    other: texts of another kind; without rows if there are none.
  """

  name: str
  texts: dict[str, list[str]]
  cfg: ModelConfig
  params: dict
  tokenizer: Tokenizer
  words: Words
  reader: Reader
  core: Said
  rehearsed: Said
  other: Said


def world(
  how: Setting,
  folder: pathlib.Path,
  model: str = '',
  core: str = '',
  rehearse: Sequence[str] = (),
  other: str = '',
) -> World:
  """Loads the model or makes it, and its texts.

  Args:
    how: the days and nights.
    folder: where the pupil is kept.
    model: path of a pretrained file; '' for the pupil, who needs no texts.
    core: path of a text that the model is to stay with.
    rehearse: paths of others of the kind, of which `how.rehearsed` needs some.
    other: path of a text of another kind, or ''.

  Raises:
    ValueError: for a text that is missing, too short or not wanted.
  """
  length, named = how.how.texts.length, {}
  if model:
    if not core:
      raise ValueError('--core=TEXT.txt: a text that the model is to stay with')
    if bool(how.rehearsed) != bool(rehearse):
      raise ValueError(
        f'rehearsed={how.rehearsed} texts a night of --rehearse={rehearse}: '
        'give files to rehearse, or --set=rehearsed=0 and none'
      )
    made = trained.load_pretrained(model)
    cfg, params, tokenizer = made.model.cfg, made.params, made.tokenizer
    rows = rehearsal.cut(tokenizer, core, 128, how.core)
    whole = [rehearsal.cut(tokenizer, path, length) for path in rehearse]
    whole = np.concatenate(whole or [np.zeros((0, length), np.int32)])
    others = (
      rehearsal.cut(tokenizer, other, 128, how.core) if other else rows[:0]
    )
    named = {'core': [core], 'rehearsed': rehearse, 'other': [other]}
    named = {k: [pathlib.Path(x).name for x in v] for k, v in named.items()}
  elif core or rehearse or other:
    raise ValueError('--core, --rehearse and --other go with a --model')
  else:
    made = pupil.kept(folder / 'pupil.npz')
    cfg, params, tokenizer = made.cfg, made.params, made.tokenizer
    rows, others = made.core[: how.core], made.core[:0]
    count = max(how.rehearsed, 2_000)
    whole = pupil.texts(tokenizer, count, seed=2, core=False)
    named = {'core': ['lines that are not rehearsed']}
    whole = whole[:, :length]
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
  return World(
    pathlib.Path(model).name or 'pupil',
    named,
    cfg,
    params,
    tokenizer,
    words,
    readers.of_model(cfg),
    *map(rehearsal.said, (rows, whole, others)),
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _call(cfg: ModelConfig, params, state, tokens_BxL):
  model = language_model.LanguageModel(cfg)
  return model.apply({'params': params}, state, tokens_BxL)[0]


def read(world: World, params, state, ids, window: int):
  """Reads a day; levels go on from `state`, if there is one.

  What does not fill the last call is left out.
  """
  state_ = state or model_state.init_state(world.cfg, 1, window)
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
    after = self.tokenizer.encode_after
    for fact in self.facts:
      for wording in (0, 6):
        asked = fact.statement(wording).removesuffix(f' {fact.what}.')
        pairs.append((encode(asked), after(f' {fact.what}')))
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

  In a row: `night`; `core` and, if there is such a text, `other`: nats a token
  of the slow weights; `chance`;
  `before`, recall of the day's facts by what the levels have written; `after`,
  recall of each day's facts so far in the morning; `dusk_core`; what the night
  counted; seconds by phase.
  """
  met = facts.days(seed, days, how.people)
  asked = [recall.ask(world.tokenizer, facts.asked(day)) for day in met]
  params, state, past = world.params, None, []

  def right(params, context, day):
    return float(recall.right(world.reader, params, context, asked[day]).mean())

  def nats(params, said, context=None):
    tokens, _, length = said
    return gate.loss(world.reader, params, context, tokens, length)

  def losses(params):
    of = {'core': nats(params, world.core)}
    if len(world.other.length_B):
      of['other'] = nats(params, world.other)
    return of

  rows = [
    {
      'night': 0,
      **losses(params),
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
      row['dusk_core'] = nats(params, world.core, context)
    held = _gathered(world, how, ids)
    params, numbers, spent = sleeper.night(
      Evening(
        params,
        state,
        held,
        _to_keep(world, how, past, seed, night),
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
    row |= losses(params)
    row['after'] = [right(params, None, i) for i in range(night)]
    row |= {'numbers': numbers, 'seconds': seconds | spent}
    rows.append(row)
    say(row)
  return rows


def _gathered(world: World, how: Setting, ids) -> texts.Day:
  buffer = replay.Replay(len(ids))
  buffer.add(replay.Piece('reader', tuple(map(int, ids))))
  return texts.gather(how.how.texts, world.words.pad, ['reader'], buffer)


def _to_keep(world: World, how: Setting, days, seed: int, night: int):
  """Rows of earlier days, of all of them alike, and of what is rehearsed.

  Always as many of either; None if there are none.
  """
  rng = np.random.default_rng((seed, night))
  parts = texts.earlier(days, how.past, rng)
  parts.append(texts.some(rng, world.rehearsed, how.rehearsed))
  return texts.joined(parts)


def _tasks(world: World, how: Setting, day) -> tuple[Cloze, ...]:
  groups = [
    day[i :: len(day) // how.asked][: how.asked] for i in range(how.tasks)
  ]
  return tuple(Cloze(tuple(group), world.tokenizer) for group in groups)
