"""Models that evaluations compare, out of words.

A word is the name of a family, trained from scratch at the size that an
evaluation gives it, or the path of a run's folder or of a pretrained file.
`hope:cms.blocks=all;cms.periods=(16,64)` is a family with keys of its config
set; a comma inside a word of `--models` wants the word in double quotes.
"""

import dataclasses
import os

from nestax.launch import trained
from nestax.launch.benches import settings
from nestax.launch.data import tokenizers
from nestax.models.config import FAMILIES, ModelConfig

# What is recomputed or unrolled changes what a step takes, and no result.
NO_RESULT = ('remat', 'unroll', 'cms.remat', 'memory.remat', 'memory.stride')


def name(word: str) -> str:
  """A word without keys that change no result: the name of its results."""
  family, _, changes = word.partition(':')
  kept = [
    change
    for change in changes.split(';')
    if change and change.partition('=')[0] not in NO_RESULT
  ]
  return f'{family}:{";".join(kept)}' if kept else family


def result_key(cfg: ModelConfig) -> dict:
  """What results depend on of a config, as nested plain dicts."""
  values = dataclasses.asdict(cfg)
  for path in NO_RESULT:
    *groups, last = path.split('.')
    at = values
    for group in groups:
      at = at[group]
    del at[last]
  return values


def config(word: str, base: dict, own: dict | None = None) -> ModelConfig:
  """The config of a family's small model.

  Args:
    word: a family, or one with keys set.
    base: nested mapping of config keys that all families share, such as V, D
      and N.
    own: the same by family, for one alone.

  Raises:
    ValueError: for a family or a key that there is not, or values that do not
      fit.
  """
  family, _, changes = word.partition(':')
  if family not in FAMILIES:
    raise ValueError(
      f'--models={word}: this evaluation trains its models; give families, '
      f'of {", ".join(FAMILIES)}'
    )
  values = dataclasses.asdict(ModelConfig())
  _update(values, base | {'family': family})
  _update(values, (own or {}).get(family, {}))
  for change in filter(None, changes.split(';')):
    settings.change(values, change, f'--models={word}')
  return ModelConfig.from_dict(values)


def _update(values: dict, new: dict) -> None:
  for key, value in new.items():
    if key not in values:
      raise KeyError(key)
    if isinstance(value, dict):
      _update(values[key], value)
    else:
      values[key] = value


def is_trained(word: str) -> bool:
  """Whether the word is the path of something that is there."""
  return os.path.exists(os.path.expanduser(word))


def check(word: str) -> None:
  """Raises a ValueError if there is nothing at the path that a word is."""
  if not is_trained(word):
    raise ValueError(
      f'--models={word}: neither a folder of a run nor a pretrained file'
    )


def load(word: str) -> trained.Trained:
  """Loads the model that a path names: a run's folder or a pretrained file.

  Raises:
    ValueError: if there is nothing there; else as `trained.load` and
      `trained.load_pretrained`.
  """
  path = _path(word)
  return trained.load(path) if _is_run(path) else trained.load_pretrained(path)


def tokenizer(word: str) -> tokenizers.Tokenizer:
  """The tokenizer of the model that `load` gives; raises as it does."""
  path = _path(word)
  if _is_run(path):
    return trained.tokenizer_of_run(path)
  return trained.tokenizer_of_pretrained(path)


def _path(word: str) -> str:
  check(word)
  return os.path.expanduser(word)


def _is_run(path: str) -> bool:
  return os.path.isdir(os.path.join(path, 'checkpoints'))
