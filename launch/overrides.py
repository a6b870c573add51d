"""Fields of nested dataclasses set by words such as `night.seed.steps=50`."""

import dataclasses
from collections.abc import Sequence


def apply(config, words: Sequence[str]):
  """Gives the dataclass with every word's field replaced.

  Args:
    config: an instance of a frozen dataclass; its fields may be dataclasses.
    words: `key=value` each; dots lead into fields.

  Raises:
    ValueError: naming the word and what would be right.
  """
  for word in words:
    key, equals, value = word.partition('=')
    if not equals:
      raise ValueError(f'{word!r}: give it as key=value')
    config = _set(config, key.split('.'), value, word)
  return config


def _set(config, path: list[str], value: str, word: str):
  known = [field.name for field in dataclasses.fields(config)]
  name, *rest = path
  if name not in known:
    raise ValueError(f'{word!r}: no key {name!r}; there are {", ".join(known)}')
  old = getattr(config, name)
  if dataclasses.is_dataclass(old) and rest:
    new = _set(old, rest, value, word)
  elif dataclasses.is_dataclass(old) or rest:
    inner = dataclasses.is_dataclass(old)
    raise ValueError(
      f'{word!r}: {name} is '
      + (f'a group; give {name}.KEY=value' if inner else 'no group of keys')
    )
  else:
    new = _parse(value, old, word)
  return dataclasses.replace(config, **{name: new})


def _parse(value: str, like, word: str):
  kind = type(like)
  if kind is bool:
    if value.lower() not in ('true', 'false'):
      raise ValueError(f'{word!r}: true or false')
    return value.lower() == 'true'
  if kind not in (int, float, str):
    raise ValueError(f'{word!r}: has a flag of its own')
  try:
    return kind(value)
  except ValueError:
    raise ValueError(
      f'{word!r}: {value!r} is no {"whole " * (kind is int)}number'
    ) from None
