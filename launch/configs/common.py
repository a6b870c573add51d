"""Every key that a config has, its default, and the values it may take."""

import dataclasses
import json
import pathlib
from typing import Any

import ml_collections

from nestax.launch import initial, optimizer
from nestax.models.config import FAMILIES, ModelConfig

# What a run may change and still be the same run: how long it goes on, what
# it writes down, and how the same mathematics is laid on the machine.
MAY_CHANGE = (
  'name',
  'train.steps',  # the learning-rate schedule then ends elsewhere
  'train.max_bad_steps',
  'train.accumulate',
  'train.loss_piece',
  'model.cms.remat',
  'model.remat',
  'model.unroll',
  'model.memory.implementation',
  'model.memory.remat',
  'model.memory.stride',
  'data.workers',
  'data.prefetch',
  'mesh',
  'checkpoint',
  'eval',
  'log',
  'profile',
)

# Keys that checkpoints from before they were there lack, and what held then.
SINCE = {
  'data.shards': 1,
  'model.cms.scope': 'shared',
  'model.memory.eta_bias': -2.0,
  'model.memory.eta_spread': 0.0,
  'model.memory.given': [],
  'model.memory.key_norm': True,
  'model.memory.stride': 1,
  'model.persistent': 0,
  'model.unroll': 1,
}


def defaults() -> ml_collections.ConfigDict:
  """Gives all groups of a config: Hope on the standard library's text."""
  config = ml_collections.ConfigDict()
  config.name = 'default'  # of the run folder, ./runs/<name>
  config.seed = 0
  config.model = dataclasses.asdict(ModelConfig())
  config.pretrained = initial.default_pretrained()
  config.data = {
    'source': 'stdlib',  # or text, jsonl, array_record
    'path': '',  # a glob; for stdlib another folder than the interpreter's
    'text_key': 'text',  # of a JSON line
    'document_bytes': 1 << 18,  # longer text files are cut into documents
    'tokenizer': 'bytes',  # or a path: tokenizer.json, SentencePiece .model
    'boundary': 'reset',  # memory at a document's start: 'reset' or 'carry'
    'length': 512,  # tokens a row
    'valid_fraction': 0.05,
    'valid_batches': 8,
    'shuffle': True,
    # Documents are dealt to so many, which share the rows of a batch; more
    # processes than shards read some of the text twice. See data/shards.py.
    'shards': 1,
    'workers': 0,
    'prefetch': 2,
  }
  config.train = {
    'steps': 1000,
    'batch': 8,  # global rows an update
    'accumulate': 1,  # microbatches that a batch is read in
    # Positions of a row whose logits exist at once, 0 for all; levels that
    # learn inside a sequence make all of them in any case.
    'loss_piece': 4096,
    'carry_state': False,  # row b of a batch goes on where the last one ended
    'max_bad_steps': 20,  # in a row; then the run stops
  }
  config.optimizer = 'm3'  # of matrices; or muon, adamw
  config.opt = optimizer.default_opt()
  # Devices along each axis; -1 for all that are left; fsdp = 0 for up to 16 of
  # data's, as the larger configs have it.
  config.mesh = {'data': -1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}
  config.checkpoint = {
    'every': 200,  # 0: only at the end
    'keep': 3,  # the newest
    'keep_every': 0,  # also those of every so many steps; 0: none
    'keep_best': 0,  # also so many with the least bits per byte on validation
  }
  config.eval = {'every': 200}  # 0: only at the end
  config.log = {
    'every': 10,
    'peak_flops': 0.0,  # of one device, for MFU; 0: from the table
    'prompt': '',  # what the sample at the end goes on from
    'sample_tokens': 400,  # 0: no sample
  }
  # A trace of so many steps from step `start` on; see launch/profile.py.
  config.profile = {'start': 10, 'steps': 0}
  return config.lock()


def keys() -> list[str]:
  """The keys that every config has, dots between group and name."""
  return list(flat(defaults().to_dict()))


LEAST = {
  'train.steps': 1,
  'train.batch': 1,
  'train.accumulate': 1,
  'train.loss_piece': 0,
  'train.max_bad_steps': 1,
  'checkpoint.every': 0,
  'checkpoint.keep': 1,
  'checkpoint.keep_every': 0,
  'checkpoint.keep_best': 0,
  'eval.every': 0,
  'log.every': 1,
  'log.peak_flops': 0,
  'log.sample_tokens': 0,
  'profile.start': 1,
  'profile.steps': 0,
}


NO_CONFIGS = {'__init__', 'common', 'sizes'}  # of the modules of this folder


def names() -> list[str]:
  """The configs of this folder, by name."""
  here = pathlib.Path(__file__).parent
  return sorted({p.stem for p in here.glob('*.py')} - NO_CONFIGS)


def path(name: str) -> str:
  """Finds a config file: a path, or the bare name of one in this folder.

  What follows a colon, as in `gated_deltanet:340m`, is for its `get_config`
  and stays where it is.

  Raises:
    FileNotFoundError: listing the names there are.
    ValueError: for a size of one of them that has only one.
  """
  known = names()
  bare, colon, word = name.partition(':')
  if bare in known:
    if colon and bare not in FAMILIES:
      raise ValueError(
        f'--config={name}: {bare} has one size: leave out :{word}'
      )
    return f'{pathlib.Path(__file__).parent / bare}.py{colon}{word}'
  file = name if pathlib.Path(name).is_file() else bare
  if not pathlib.Path(file).is_file():
    raise FileNotFoundError(
      f'no config file {name!r}; the configs that come along are '
      f'{", ".join(known)}'
    )
  return name


def check(config) -> None:
  """Checks the numbers of the loop; models, data and optimisers check theirs.

  Raises:
    ValueError: naming key, value and what it may be.
  """
  for key, least in LEAST.items():
    group, name = key.split('.')
    if not config[group][name] >= least:  # so that NaN is refused too
      raise ValueError(
        f'{key} is {config[group][name]}: it has to be at least {least}'
      )
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'seed is {config.seed}: it has to be 0 to 2**32 - 1')
  batch, parts = config.train.batch, config.train.accumulate
  if batch % parts:
    raise ValueError(
      f'train.batch = {batch} rows cannot be read in train.accumulate = '
      f'{parts} equal parts'
    )
  _check_kept(config.checkpoint, config.eval.every)


def _check_kept(config, evaluations: int) -> None:
  """Refuses settings by which nothing more would be kept."""
  if config.keep_every and (
    not config.every or config.keep_every % config.every
  ):
    raise ValueError(
      f'checkpoint.keep_every is {config.keep_every}: it has to be a multiple '
      f'of checkpoint.every, which is {config.every}'
    )
  if config.keep_best and (
    not config.every or not evaluations or config.every % evaluations
  ):
    raise ValueError(
      f'checkpoint.keep_best is {config.keep_best}: every checkpoint has to be '
      f'evaluated, so checkpoint.every ({config.every}) has to be a multiple '
      f'of eval.every ({evaluations}), both above 0'
    )


def plain(config) -> dict[str, Any]:
  """Turns a ConfigDict into what JSON would give back."""
  return json.loads(json.dumps(config.to_dict()))


def differing(there: dict, here: dict) -> list[str]:
  """Says in words which keys of two plain configs differ, but MAY_CHANGE.

  A key that is not set is None.
  """
  there, here = SINCE | flat(there), SINCE | flat(here)
  return [
    words
    for key, words in sorted(unequal(there, here).items())
    if there.get(key) != here.get(key)
    and not any(f'{key}.'.startswith(f'{free}.') for free in MAY_CHANGE)
  ]


def unequal(there: dict, here: dict) -> dict[str, str]:
  """Of two flat dicts the keys that differ, in order, and how, in words."""
  a, b = (
    {key: repr(x) for key, x in values.items()} for values in (there, here)
  )
  return {
    key: f'{key} is {a.get(key, "not set")} there and '
    f'{b.get(key, "not set")} here'
    for key in there | here
    if a.get(key) != b.get(key)
  }


def flat(config: dict, prefix: str = '') -> dict[str, Any]:
  """A nested dict by keys with dots between group and name.

  An empty group keeps its own key.
  """
  found = {}
  for key, value in config.items():
    if value and isinstance(value, dict):
      found |= flat(value, f'{prefix}{key}.')
    else:
      found[f'{prefix}{key}'] = value
  return found
