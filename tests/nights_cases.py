"""A life small enough for tests: a model, two owners, two days."""

import dataclasses
import functools
import json
import random

import flax.linen as nn
import jax
import numpy as np

from nestax.launch import days, life, plans, trained
from nestax.launch.data import tokenizers
from nestax.launch.sleep_options import Options
from nestax.models import language_model
from nestax.models.config import ModelConfig
from nestax.sleep import tools as tools_
from nestax.sleep.gate import GateConfig
from nestax.sleep.objective import SeedConfig
from nestax.sleep.replay import Replay
from nestax.sleep.texts import TextsConfig
from nestax.sleep.tools import CycleConfig

NIGHT = CycleConfig(
  SeedConfig(steps=8, rate=0.03, rows=2, alpha=1.0, on_policy=0.0),
  TextsConfig(length=10, read=4, continued=0, free=0),
  GateConfig(core=9.0, day=-0.9),
)
OPTIONS = Options(
  piece=8, window=8, core_rows=4, probe_rows=2, rank=2, night=NIGHT
)
# the same by the command line
SET = (
  'piece=8,window=8,core_rows=4,probe_rows=2,rank=2,night.seed.steps=8,'
  'night.seed.rate=0.03,night.seed.rows=2,night.seed.alpha=1,'
  'night.seed.on_policy=0,night.seed.last=1,night.seed.keep=1,'
  'night.seed.every=1,night.seed.say=0,'
  'night.texts.length=10,night.texts.read=4,'
  'night.texts.continued=0,night.texts.free=0,night.gate.core=9,'
  'night.gate.day=-0.9'
)


@functools.cache
def made(slots=8, blocks='all', scope='shared'):
  """A model that nobody has trained."""
  cfg = ModelConfig.from_dict(
    {
      'family': 'hope_attention',
      'D': 8,
      'N': 2,
      'H': 2,
      'F': 16,
      'dtype': 'float32',
      'cms': {'periods': (4, 8), 'blocks': blocks, 'rate': 0.5},
    }
  )
  model = language_model.LanguageModel(cfg)
  tokens = np.zeros((1, 1), np.int32)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), None, tokens))
  found = tokenizers.load('bytes')
  new = trained.Trained(model, params['params'], found, 0, 'bytes')
  return plans.equipped(new, slots, OPTIONS, scope) if slots else new


def write_texts(folder):
  """Writes what two owners read, and the core set."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = random.Random(0)
  for name, size in (('ann', 70), ('bob', 45), ('core', 60)):
    text = ''.join(rng.choices('abc ', k=size))
    (folder / f'{name}.txt').write_text(text)
  return folder


def write_run(folder):
  """Puts the model into a run folder that `trained.load` reads."""
  folder.mkdir(parents=True, exist_ok=True)
  store = life.Store(folder, made(), OPTIONS, print)
  params = made().params
  store.save(
    life.Being(params, None, np.zeros((1, 1))), life.Past([], Replay(2))
  )
  store.close()
  return folder


def plan(
  folder, count=2, only=(), tasks=(), names=('ann', 'bob'), scope='shared',
  rehearse=(), asked='', **options,
):  # fmt: skip
  """The plan of a life that reads the texts of `write_texts`."""
  options = dataclasses.replace(OPTIONS, **options)
  paths = [str(folder / f'{name}.txt') for name in names]
  read = days.load(paths, count, made().tokenizer)
  core = str(folder / 'core.txt')
  model = made(scope=scope)
  new = plans.prepare(
    model, read, core, options, only, tasks, rehearse, asked=asked
  )
  return new._replace(tools=tools(scope))


@functools.cache
def tools(scope='shared'):
  """Programs of all lives, so that they are compiled once."""
  model = made(scope=scope)
  return tools_.of_model(model.model.cfg, NIGHT, plans.words_of(model))


def rows(out):
  """The lines of `night.jsonl`, without what the clock says."""
  lines = (out / 'night.jsonl').read_text().splitlines()
  return [json.loads(line) | {'seconds': None} for line in lines]


def used(rows):
  """Slots that every level uses, of each line."""
  return [[x['used'] for x in row['levels'].values()] for row in rows]


def same(a, b):
  """Whether two trees have the same bits."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all((np.asarray(x) == np.asarray(y)).all() for x, y in pairs)
