"""Trained models that learn while they read, or do not, out of words.

A word is the path of a run's folder or of a pretrained file. Behind a colon
keys say what becomes of it, a semicolon between them:

    SmolLM2.gguf:stack=groups;periods=128+512;rate=0.1
    runs/learning:levels=off
"""

import dataclasses

from nestax.launch import overrides, trained
from nestax.launch.evals import entrants, streaming
from nestax.models import language_model, stacking
from nestax.models.continuum import CMSConfig


@dataclasses.dataclass(frozen=True)
class Way:
  """What becomes of a trained model.

  Attributes:
    stack: 'groups' or 'copies' makes levels of a Transformer's MLPs; '' not.
    periods: of these levels, a plus between them.
    blocks: which of their blocks learn.
    rate, optimizer: inner ones, of these levels.
    levels: 'off' freezes all levels.
    dtype: that it computes in; '' for its own.
  """

  stack: str = ''
  periods: str = '128'
  blocks: str = 'all'
  rate: float = 0.1
  optimizer: str = 'sgd'
  levels: str = 'on'
  dtype: str = ''


def numbers(words: str, what: str) -> tuple[int, ...]:
  """Whole numbers with a plus between them, such as 128+512.

  Raises:
    ValueError: naming `what` they should be.
  """
  parts = words.split('+')
  if not all(part.strip().isdigit() for part in parts):
    raise ValueError(f'{what}={words}: whole numbers such as 128+512')
  return tuple(map(int, parts))


def parse(word: str) -> tuple[str, Way]:
  """The path in a word, and the way.

  Raises:
    ValueError: for keys or values that there are not.
  """
  path, _, changes = word.partition(':')
  try:
    way = overrides.apply(Way(), list(filter(None, changes.split(';'))))
  except ValueError as error:
    raise ValueError(f'--models={word}: {error}') from None
  if way.levels not in ('on', 'off'):
    raise ValueError(f'--models={word}: levels are on or off')
  if way.stack not in ('', *stacking.HOW):
    raise ValueError(
      f'--models={word}: stack is one of {", ".join(stacking.HOW)}'
    )
  numbers(way.periods, f'--models={word}: periods')
  own = ('periods', 'blocks', 'rate', 'optimizer')
  if not way.stack and any(
    getattr(way, name) != getattr(Way(), name) for name in own
  ):
    raise ValueError(
      f'--models={word}: {", ".join(own)} are of levels that are stacked: '
      'add stack=groups or stack=copies'
    )
  return path, way


def check(word: str) -> None:
  """Raises a ValueError for a word that is none, or if nothing is there."""
  entrants.check(parse(word)[0])


def load(word: str) -> trained.Trained:
  """Loads the model of a word.

  Raises:
    ValueError: for a word that is none, or what does not fit the model; else
      as `entrants.load`.
  """
  path, way = parse(word)
  return apply(entrants.load(path), way)


def apply(made: trained.Trained, way: Way) -> trained.Trained:
  """Gives the model with its levels as the way says."""
  cfg, params = made.model.cfg, made.params
  if way.dtype:
    cfg = dataclasses.replace(cfg, dtype=way.dtype)
  if way.stack:
    cms = CMSConfig(
      periods=numbers(way.periods, 'periods'),
      blocks=way.blocks,
      rate=way.rate,
      optimizer=way.optimizer,
    )
    cfg, params = stacking.stack(cfg, params, way.stack, cms)
  model = language_model.LanguageModel(cfg)
  if way.levels == 'off' and cfg.stream:
    model = streaming.frozen(model)
  return made._replace(model=model, params=params)
