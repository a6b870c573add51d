"""Whether the fields of a frozen config hold what they are declared to."""

import dataclasses
import functools
import numbers
import typing

import numpy as np

# A float may be given as a whole number; numbers of numpy will do as well.
ACCEPTED = {
  bool: (bool, np.bool_),
  int: numbers.Integral,
  float: numbers.Real,
}


def check(config) -> None:
  """Refuses fields of another type than declared.

  Args:
    config: a dataclass, whose fields are numbers, words, flags, tuples of
      them, or such dataclasses.

  Raises:
    ValueError: naming the field, what it holds, and what is wanted.
  """
  for name, hint in _hints(type(config)).items():
    value = getattr(config, name)
    if typing.get_origin(hint) is tuple:
      item = typing.get_args(hint)[0]
      if not isinstance(value, tuple) or not all(_is(item, x) for x in value):
        raise ValueError(
          f'{name}={value!r}: a tuple of {item.__name__} is wanted'
        )
    elif not _is(hint, value):
      what = type(value).__name__
      raise ValueError(
        f'{name}={value!r}: {_kind(hint)} is wanted, not a {what}'
      )


def _is(hint, value) -> bool:
  if isinstance(value, (bool, np.bool_)):
    return hint is bool
  return isinstance(value, ACCEPTED.get(hint, hint))


def _kind(hint) -> str:
  article = 'an' if hint is int else 'a'
  return f'{article} {hint.__name__}'


@functools.cache
def _hints(cls):
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
