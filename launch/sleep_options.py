"""How a life of days and nights goes on, and the nights that were measured."""

import dataclasses

from nestax.sleep.dream import DreamConfig
from nestax.sleep.objective import SeedConfig
from nestax.sleep.texts import TextsConfig
from nestax.sleep.tools import CycleConfig

EVERY_DAY = -1  # nights: one after each day, or whenever `sleep_every` says

# Nights of small models: a minute or two of a laptop.
SMALL = CycleConfig(
  seed=SeedConfig(
    steps=100, rows=8, rate=3e-3, last=0.1, keep=2.0, every=8, say=16
  ),
  texts=TextsConfig(length=64, read=32, continued=0, free=0, kept=64),
)
# Those of pretrained ones: what five nights of SmolLM2-135M were measured with
# (`evals.lives`), which learns little in the above.
LARGE = CycleConfig(
  seed=SeedConfig(
    steps=300, rows=16, rate=1e-2, last=0.05, keep=2.0, every=12, say=16
  ),
  texts=TextsConfig(length=64, read=256, continued=0, free=0, kept=128),
  # at 0.0003 a pretrained model's slot learns dreams that harm it
  dream=DreamConfig(inner_rate=1e-4, rate=1e-4),
)


@dataclasses.dataclass(frozen=True)
class Options:
  """How a life goes on; all of it may change from one call to the next.

  Attributes:
    nights: most nights ever; EVERY_DAY for no limit.
    sleep_every: tokens of the stream between nights; 0 for one after each day.
    readings: how often a day is read before its night.
    piece: tokens that are read at once.
    window: tokens that attention sees while days are read. What it still sees
      it can copy, and the levels learn little of it.
    capacity: tokens of the replay buffer, of each owner.
    surprise: what cost more when it was read is noise and is not consolidated,
      nats a token.
    disagreement: what costs the slow weights alone more contradicts them and is
      not consolidated, nats a token.
    rehearsed: rows a night of the texts to rehearse, if there are any.
    earlier: rows a night of each owner's earlier days; 0 for none, and nothing
      of a day is held when it has been slept on.
    held: tokens of earlier days that are held, of each owner.
    core_rows: texts of the core set.
    probe_rows: texts of each owner's day that retention is measured on.
    keep: checkpoints; 0 for all.
    rank: of the slots that a model without any is given.
    seed: of all that is random.
    arc: glob of ARC tasks to dream about.
    dream: file of questions, as `launch/questions.py` has them, that dreams
      about the days must help with; none of those that are asked.
    night: how a night goes.
  """

  nights: int = EVERY_DAY
  sleep_every: int = 0
  readings: int = 1
  piece: int = 128
  window: int = 2048
  capacity: int = 8192
  surprise: float = float('inf')
  disagreement: float = float('inf')
  rehearsed: int = 512
  earlier: int = 0
  held: int = 65_536
  core_rows: int = 64
  probe_rows: int = 16
  keep: int = 3
  rank: int = 8
  seed: int = 0
  arc: str = ''
  dream: str = ''
  night: CycleConfig = SMALL

  def __post_init__(self):
    for name, least in (
      ('nights', EVERY_DAY),
      ('sleep_every', 0),
      ('readings', 1),
      ('piece', 1),
      ('window', 1),
      ('capacity', 2),
      ('rehearsed', 1),
      ('earlier', 0),
      ('held', 2),
      ('core_rows', 1),
      ('probe_rows', 1),
      ('keep', 0),
      ('rank', 1),
      ('seed', 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(f'{name}={getattr(self, name)}: at least {least}')
    if self.sleep_every and self.readings > 1:
      raise ValueError(
        f'readings={self.readings} are of whole days, before their nights: '
        f'leave out sleep_every={self.sleep_every}, or read once'
      )
    for name in ('surprise', 'disagreement'):
      if not getattr(self, name) > 0:
        raise ValueError(f'{name}={getattr(self, name)}: above 0')


PRETRAINED = Options(
  readings=4, window=64, capacity=16_384, rank=32, night=LARGE
)
