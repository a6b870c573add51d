"""The continuum in a model: which blocks' levels learn, when and how."""

import dataclasses
import itertools
from typing import NamedTuple

from nestax.cms.chain import VARIANTS
from nestax.cms.objective import OBJECTIVES
from nestax.cms.stream import DIFFERENTIATE, StreamConfig
from nestax.cms.update import UpdateConfig
from nestax.cms.walk import REMATS
from nestax.models import fields

WIDTHS = ('split', 'full')
ASSIGN = ('chain', 'groups')
SCOPES = ('shared', 'owner')


class Group(NamedTuple):
  """The levels of one period: level `slot` of each of `blocks`."""

  slot: int
  blocks: tuple[int, ...]


class Segment(NamedTuple):
  """Blocks `start` to `stop - 1`, all of which learn, or none of them.

  `offset` is the place of the first one among the blocks that learn.
  """

  start: int
  stop: int
  offset: int | None


@dataclasses.dataclass(frozen=True)
class CMSConfig:
  """The continuum of levels in every block (NL section 7).

  Attributes:
    periods: tokens between commits, fastest level first; 0 for a level that
      never commits.
    multiple: hidden widths of levels are multiples of it.
    blocks: the blocks whose levels learn inside a sequence: 'none', 'all',
      'last_quarter', or numbers such as '3,5'. All levels of the others are
      ordinary MLPs.
    width: 'split' shares the hidden width F out among the levels of a block,
      'full' gives each of them F.
    assign: 'chain' puts every period into every block; 'groups' gives each
      block one level, and the blocks that learn, from the first, the periods
      in equal groups (ad-hoc level stacking by layers, NL section 7.3).
    variant: how levels are composed, one of `cms.chain.VARIANTS`.
    mix: first weight of a level in the sum of the variant 'independent'.
    objective: what levels learn from, one of `cms.objective.OBJECTIVES`.
    differentiate: 'full' or 'first_order', see `cms.stream.StreamConfig`.
    remat: what the backward pass recomputes where it goes through the chunks
      of levels that learn (in full, and some of first order): 'chunks' every
      chunk from what was written before it; 'groups' groups of chunks as well,
      so that as many states are kept as the square root of the chunks, for
      some tenth of the step's time.
    optimizer: inner optimiser, one of `cms.update.OPTIMIZERS`.
    rate: first inner learning rate of every level; 0 freezes all. It is
      learned: `params['log_rate']` has its logarithm for every block that
      learns and level of it, where -inf freezes one level.
    beta, clip, ns_steps: of the inner optimiser, see `cms.update`.
    slots: expert slots of every level that sleep may grow into, see
      `cms.experts`; 0 makes none.
    rank: of a slot.
    scope: whose slots they are: 'shared' ones are slow weights that every
      sequence sees; those of an 'owner' are in the state of a sequence and go
      with it (the parameters then hold empty ones only, for fresh sequences).
  """

  periods: tuple[int, ...] = (128, 512, 2048)
  multiple: int = 8
  blocks: str = 'none'
  width: str = 'split'
  assign: str = 'chain'
  variant: str = 'sequential'
  mix: float = 1.0
  objective: str = 'next_token'
  differentiate: str = 'first_order'
  remat: str = 'chunks'
  optimizer: str = 'sgd'
  rate: float = 1.0
  beta: float = 0.9
  clip: float = 1.0
  ns_steps: int = 5
  slots: int = 0
  rank: int = 8
  scope: str = 'shared'

  def __post_init__(self):
    fields.check(self)
    for name, known in (
      ('scope', SCOPES),
      ('width', WIDTHS),
      ('assign', ASSIGN),
      ('variant', VARIANTS),
      ('objective', OBJECTIVES),
      ('differentiate', DIFFERENTIATE),
      ('remat', REMATS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f'{name}={getattr(self, name)!r}: one of {known}')
    if not 0 <= self.rate < float('inf'):
      raise ValueError(f'rate={self.rate}: 0 or above, and finite')
    if self.slots < 0 or self.rank < 1:
      raise ValueError(
        f'slots={self.slots}, rank={self.rank}: 0 slots or more, of a rank of '
        'at least 1'
      )
    if self.blocks != 'none' and not self.learning:
      raise ValueError(
        f'periods={self.periods}, blocks={self.blocks!r}: no level ever '
        "commits; give a period, or blocks='none'"
      )
    if self.blocks != 'none' and min(self.learning) < 2:
      raise ValueError(
        f'periods={self.periods}: a level learns from pairs of tokens inside '
        'the smallest period, which must be at least 2'
      )
    if self.assign == 'groups' and 0 in self.periods:
      raise ValueError(
        f"periods={self.periods}: assign='groups' gives every group of blocks "
        'a period; leave blocks that shall not learn out of `blocks`'
      )
    _ = self.update

  @property
  def learning(self) -> tuple[int, ...]:
    """The periods of the levels that learn; 0 is an ordinary MLP's."""
    return tuple(period for period in self.periods if period)

  @property
  def update(self) -> UpdateConfig:
    return UpdateConfig(self.optimizer, self.beta, self.clip, self.ns_steps)

  @property
  def stream(self) -> StreamConfig:
    nested = self.variant == 'nested'
    return StreamConfig(self.learning, self.update, self.differentiate, nested)

  @property
  def keeps_inputs(self) -> bool:
    """Whether a level's inputs are needed beside the loss of the network."""
    return self.objective == 'reconstruction' or self.optimizer == 'dgd'

  def adapting(self, N: int) -> tuple[int, ...]:
    """The blocks of N whose levels learn inside a sequence.

    Raises:
      ValueError: for a name or a number that is none of a block.
    """
    if self.blocks == 'none':
      return ()
    if self.blocks == 'all':
      return tuple(range(N))
    if self.blocks == 'last_quarter':
      return tuple(range(N - max(1, N // 4), N))
    try:
      chosen = sorted({int(word) for word in self.blocks.split(',')})
    except ValueError:
      raise ValueError(
        f"blocks={self.blocks!r}: 'none', 'all', 'last_quarter' or numbers of "
        "blocks such as '3,5'"
      ) from None
    if chosen[0] < 0 or chosen[-1] >= N:
      raise ValueError(f'blocks={self.blocks!r}: numbers from 0 to {N - 1}')
    return tuple(chosen)

  def groups(self, adapting: tuple[int, ...]) -> tuple[Group, ...]:
    """The levels of each period, fastest first."""
    P, n = len(self.periods), len(adapting)
    if self.assign == 'chain':
      learning = [slot for slot, period in enumerate(self.periods) if period]
      return tuple(Group(slot, adapting) for slot in learning)
    if n and n < P:
      raise ValueError(
        f"cms.assign='groups' (stack='groups') gives each of the {P} of "
        f'cms.periods={self.periods} blocks of its own, and cms.blocks='
        f'{self.blocks!r} lets {n} learn: fewer periods or more blocks'
      )
    ends = [round(i * n / P) for i in range(P + 1)]
    return tuple(Group(0, adapting[a:b]) for a, b in zip(ends, ends[1:]))

  def segments(self, adapting: tuple[int, ...], N: int) -> tuple[Segment, ...]:
    """Runs of equal blocks from the first that learns to the last of N.

    Those are equal whose levels have the same periods, or none.
    """
    which = dict.fromkeys(adapting, 0)
    if self.assign == 'groups':
      groups = enumerate(self.groups(adapting))
      which = {i: k for k, group in groups for i in group.blocks}
    runs, offset = [], 0
    start = adapting[0] if adapting else N
    for kind, run in itertools.groupby(range(start, N), which.get):
      learns = kind is not None
      run = list(run)
      runs.append(Segment(run[0], run[-1] + 1, offset if learns else None))
      offset += len(run) if learns else 0
    return tuple(runs)
