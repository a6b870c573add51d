"""What all nights of a model share: how they go, and their programs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from nestax.models import language_model
from nestax.models.config import ModelConfig
from nestax.sleep import dream, given, grow, imitate, seed, texts
from nestax.sleep import reader as readers
from nestax.sleep.dream import DreamConfig
from nestax.sleep.gate import GateConfig
from nestax.sleep.objective import SeedConfig
from nestax.sleep.reader import Reader
from nestax.sleep.texts import TextsConfig, Words

FULL = ('error', 'merge')


@dataclasses.dataclass(frozen=True)
class CycleConfig:
  """A night.

  Attributes:
    seed: how a slot learns.
    texts: what it learns from.
    gate: what a night may cost.
    dream: how it dreams, if it is given tasks.
    every: the pair with sender k is due in nights that are multiples of
      `every ** k`.
    full: if a receiver has no free slot, 'error' refuses the night, before
      anything is done, and 'merge' folds its slots into its MLP first. A night
      uses up two slots of the slowest levels, for what they have written
      themselves and for what the next faster ones held; one if there are no
      others. All others' slots are emptied, and then hold one night.
    lost: greatest error of a merge, see `experts.fold`; above it, an error.
  """

  seed: SeedConfig = SeedConfig()
  texts: TextsConfig = TextsConfig()
  gate: GateConfig = GateConfig()
  dream: DreamConfig = DreamConfig()
  every: int = 1
  full: str = 'error'
  lost: float = 0.2

  def __post_init__(self):
    if self.full not in FULL:
      raise ValueError(f'full={self.full!r}: one of {", ".join(FULL)}')
    if self.every < 1:
      raise ValueError(f'every={self.every}: at least 1')
    if not 0 <= self.lost <= 1:
      raise ValueError(f'lost={self.lost}: from 0 to 1')

  def due(self, night: int, P: int) -> tuple[int, ...]:
    """The senders of a night (from 1) of P levels, the slowest first."""
    return tuple(k for k in reversed(range(P)) if night % self.every**k == 0)


class Tools(NamedTuple):
  """The programs of all nights of a model, compiled once."""

  cfg: ModelConfig
  how: CycleConfig
  words: Words
  reader: Reader
  compute: Callable  # (params, state) -> state
  speak: Callable  # (params, context, prompts, key) -> Said
  seeds: dict[int, seed.Programs]  # by receiver
  dreams: dict[int, dream.Programs]  # by receiver


def of_model(
  cfg: ModelConfig,
  how: CycleConfig,
  words: Words,
  semantic: Callable = imitate.agreement,
) -> Tools:
  """Makes the programs.

  Args:
    cfg: the model.
    how: its nights.
    words: ids with a meaning.
    semantic: the part of the reward that is for meaning, jax on batches:
      `(teacher's logits, tokens, mask) -> r_sem`, as `imitate.agreement`.

  Raises:
    SlotsError: for a model that cannot sleep.
    ValueError: for ids that its vocabulary does not have.
  """
  grow.check(cfg)
  given.words(cfg, words)
  reader = readers.of_model(cfg, words.allowed_V)

  def put(among, place, new):
    params, k, index = place
    return grow.put_among(cfg, params, among, k, index, new)

  disturb = functools.partial(dream.random_expert, cfg)
  hear = seed.hearing(how.seed, reader, semantic)
  seeds, dreams = {}, {}
  for among in _alike(cfg):
    own = functools.partial(put, among)
    learns = seed.programs(how.seed, reader, own, words.eos, hear)
    dreamt = dream.programs(
      how.dream, reader, own, disturb, words.bos, words.eos
    )
    seeds |= dict.fromkeys(among, learns)
    dreams |= dict.fromkeys(among, dreamt)
  return Tools(
    cfg,
    how,
    words,
    reader,
    jax.jit(functools.partial(language_model.flush, cfg)),
    texts.speaker(how.texts, reader, words),
    seeds,
    dreams,
  )


def _alike(cfg: ModelConfig) -> list[tuple[int, ...]]:
  """The receivers, those together that programs can be shared by.

  Levels of the same blocks: their slots are of one shape, and a gradient goes
  no further back for one of them than for another.
  """
  senders = range(len(cfg.groups))
  found = {}
  for k in sorted({grow.receiver(cfg, k) for k in senders}):
    found.setdefault(cfg.groups[k].blocks, []).append(k)
  return [tuple(among) for among in found.values()]
