"""Models that benchmarks time: configs by name, with what a flag changes."""

import ast
import dataclasses
import importlib.util
from collections.abc import Sequence

import ml_collections

from nestax.launch.configs import common
from nestax.models.config import ModelConfig

LEVELS = ('frozen', 'first_order', 'full')


class SettingError(ValueError):
  """A flag asks for a config, a key or a mode that is not there."""


def load(name: str, changes: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """Reads a config and changes some of its keys.

  Args:
    name: of a config that comes along, or a path; with its size or other word
      after a colon, where it takes one.
    changes: such as `model.D=64` or `model.cms.periods=(8,16)`.

  Raises:
    SettingError: for a change that is none, or a key that is not there.
    FileNotFoundError: for a config that is not there.
  """
  path, _, word = common.path(name).partition('.py:')
  path = f'{path}.py' if word else path
  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(*([word] if word else []))
  for words in changes:
    change(config, words, f'--set={words}')
  return config


def change(config, words: str, flag: str) -> None:
  """Sets one key of nested mappings, such as `model.D=64`.

  Args:
    config: ConfigDict or dict.
    words: the key and its value.
    flag: what an error names.

  Raises:
    SettingError: for words that are no change, or a key that is not there.
  """
  key, equals, word = words.partition('=')
  if not equals:
    raise SettingError(f'{flag}: write it as key=value')
  *groups, last = key.split('.')
  at = config
  for group in groups:
    at = at[group] if hasattr(at, 'keys') and group in at else None
  if not hasattr(at, 'keys') or last not in at:
    raise SettingError(f'{flag}: there is no key {key!r}')
  value, kind = _value(word), type(at[last])
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise SettingError(
      f'{flag}: {key} is a {kind.__name__}, such as {at[last]!r}'
    )
  at[last] = value


def _value(word: str):
  try:
    return ast.literal_eval(word)
  except (SyntaxError, ValueError):
    return word


def with_levels(cfg: ModelConfig, levels: str, blocks: str) -> ModelConfig:
  """The model with its levels learning as `levels` says.

  Args:
    cfg: the model.
    levels: one of LEVELS.
    blocks: that learn, where the config names none, see `CMSConfig.blocks`.

  Raises:
    SettingError: for another word.
  """
  if levels not in LEVELS:
    raise SettingError(f'--levels={levels}: one of {", ".join(LEVELS)}')
  if levels == 'frozen':
    cms = dataclasses.replace(cfg.cms, blocks='none')
    return dataclasses.replace(cfg, cms=cms)
  chosen = blocks if cfg.cms.blocks == 'none' else cfg.cms.blocks
  cms = dataclasses.replace(cfg.cms, blocks=chosen, differentiate=levels)
  return dataclasses.replace(cfg, cms=cms)


def modes(cfg: ModelConfig, levels: Sequence[str]) -> tuple[str, ...]:
  """Those of `levels` that the model has: without a continuum only frozen."""
  if cfg.learns:
    return tuple(levels)
  return ('frozen',)
