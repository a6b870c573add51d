"""Refuses arguments in words, when a transformation is made.

Each check takes the error to raise, the argument's name and its value. Values
that are traced pass: `optax.inject_hyperparams` makes a transformation anew
inside `jit`, where numbers are not known.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

FLOATS = ('bfloat16', 'float32')
# An int that is a shape or a static count; an array is what becomes of it
# under `optax.inject_hyperparams`.
_STATIC = '; under optax.inject_hyperparams name it in static_args'


def within(
  error: type[Exception],
  name: str,
  value: Any,
  low: float = 0.0,
  high: float = math.inf,
  *,
  low_open: bool = False,
  high_open: bool = True,
) -> None:
  """Refuses what is not a number from `low` to `high`; NaN always."""
  try:
    number = math.nan if isinstance(value, (str, bytes)) else float(value)
  except jax.errors.ConcretizationTypeError:
    return
  except (TypeError, ValueError):
    number = math.nan
  above = low < number if low_open else low <= number
  below = number < high if high_open else number <= high
  if above and below:
    return
  least = f'above {low:g}' if low_open else f'{low:g} or above'
  most = f'below {high:g}' if high_open else f'at most {high:g}'
  most = 'finite' if high == math.inf else most
  raise error(f'{name} is {value!r}: it has to be {least}, and {most}')


def rate(error: type[Exception], name: str, value: Any) -> None:
  """Refuses a learning rate that is neither a schedule nor 0 or above."""
  if not callable(value):
    within(error, name, value)


def whole(error: type[Exception], name: str, value: Any, low: int = 1) -> None:
  """Refuses what is not an int of Python's, `low` or above."""
  if isinstance(value, int) and not isinstance(value, bool) and value >= low:
    return
  words = _STATIC if isinstance(value, jax.Array) else ''
  raise error(
    f'{name} is {value!r}: it has to be a whole number, {low} or above{words}'
  )


def one_of(
  error: type[Exception], name: str, value: Any, known: Sequence[str]
) -> None:
  """Refuses a word that is not among those known."""
  if value not in known:
    raise error(f'{name} is {value!r}: it has to be one of ' + ', '.join(known))


def floating(error: type[Exception], name: str, value: Any) -> None:
  """Refuses a dtype other than bfloat16 and float32."""
  try:
    word = jnp.dtype(value).name
  except TypeError:
    word = value
  if word not in FLOATS:
    raise error(f'{name} is {word!r}: it has to be one of ' + ', '.join(FLOATS))
