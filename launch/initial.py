"""Where training starts: from scratch, or from a pretrained file."""

import dataclasses
from typing import Any

import ml_collections

from nestax.launch import trained
from nestax.models import pretrained, stacking
from nestax.models.config import ModelConfig

# Of `config.model`, what is the run's to choose; the file says the rest.
CHOSEN = ('cms', 'dtype', 'remat', 'unroll', 'window')


def default_pretrained() -> dict[str, Any]:
  """Gives the `config.pretrained` group with its defaults, as a plain dict."""
  return {
    'path': '',  # of a file that models/pretrained.py reads; '' for none
    'stack': '',  # its MLPs become levels: by 'groups' or as 'copies'
  }


def resolve(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, dict | None]:
  """Reads the pretrained file that a config names, if it names one.

  Args:
    config: of a run; `model.cms`, `dtype`, `remat`, `unroll` and `window` are
      kept, the rest of `model` is the file's. Where `data.tokenizer` is left
      at bytes, it becomes the file's own.

  Returns:
    The config with `model` filled in, and the parameters (numpy, nested
    dicts, without those that the file cannot have, such as inner rates), or
    the config as it was and None.

  Raises:
    FileNotFoundError: if the file or its tokenizer is not there.
    ValueError: in words, if it cannot be used or the config wants another
      model.
  """
  path, how = config.pretrained.path, config.pretrained.stack
  if not path:
    if how:
      raise ValueError(
        f'pretrained.stack is {how!r}, but there is no model to stack: give '
        'pretrained.path'
      )
    return config, None
  values = config.model.to_dict()
  # numbers of blocks are those of the file's model
  blocks, values['cms']['blocks'] = values['cms']['blocks'], 'none'
  wanted = ModelConfig.from_dict(values)
  found, params = pretrained.load(path)
  chosen = {name: getattr(wanted, name) for name in CHOSEN}
  chosen['cms'] = dataclasses.replace(wanted.cms, blocks=blocks)
  chosen['window'] = wanted.window or found.window
  made = dataclasses.replace(found, **chosen)
  if how:
    made, params = stacking.stack(made, params, how, made.cms)
  _check(wanted, made, path)
  config = ml_collections.ConfigDict(config.to_dict())
  config.model = dataclasses.asdict(made)
  if config.data.tokenizer == 'bytes':
    config.data.tokenizer = trained.tokenizer_of(path, made.V)
  return config.lock(), params


def _check(wanted: ModelConfig, made: ModelConfig, path: str) -> None:
  """Refuses a config that names another model than the file's."""
  usual = ModelConfig()
  for field in dataclasses.fields(ModelConfig):
    if field.name in CHOSEN:
      continue
    asked, got = getattr(wanted, field.name), getattr(made, field.name)
    if asked not in (got, getattr(usual, field.name)):
      raise ValueError(
        f'model.{field.name} is {asked!r}, but {path} holds a model with '
        f'{got!r}: leave it out of the config, the file says it'
      )


def fill(fresh: dict, given: dict, path: str = '') -> dict:
  """Fresh parameters with those that are given in their place.

  Args:
    fresh: arrays or shapes, nested dicts.
    given: arrays; some of the same paths.
    path: of both, for messages.

  Raises:
    ValueError: for a path or a shape that the model does not have.
  """
  if not isinstance(given, dict):
    if isinstance(fresh, dict) or fresh.shape != given.shape:
      shape = 'a group' if isinstance(fresh, dict) else fresh.shape
      raise ValueError(f'{path}: given {given.shape}, the model has {shape}')
    return given
  unknown = sorted(set(given) - set(fresh))
  if unknown:
    raise ValueError(f'{path or "parameters"}: the model has no {unknown}')
  return fresh | {
    name: fill(fresh[name], part, f'{path}/{name}'.strip('/'))
    for name, part in given.items()
  }
