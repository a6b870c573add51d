"""What a model is: static, hashable, checked once at the border."""

import dataclasses
import types
import typing

import jax.numpy as jnp

from nestax.cms.schedule import Level, Schedule, split_width
from nestax.cms.stream import StreamConfig
from nestax.models import families, fields
from nestax.models.continuum import CMSConfig, Group, Segment
from nestax.models.families import FAMILIES, FAMILY
from nestax.models.memory.types import MemoryConfig

DTYPES = {'bfloat16': jnp.bfloat16, 'float32': jnp.float32}
REMATS = ('none', 'kernels', 'dots', 'full', 'offload')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A language model.

  Attributes:
    family: one of FAMILIES; what each is made of, and which of the keys below
      it does not read and refuses, is in `models.families`.
    V: vocabulary size.
    D: width.
    N: number of blocks.
    H: heads.
    K: head width; 0 means D / H.
    G: key and value heads of attention (GQA); 0 means H.
    F: hidden width of the MLP, shared out among the levels of a continuum.
    window: attention sees the last `window` tokens; 0 means all.
    rope_base: of the rotary angles.
    taps: width of the causal convolutions of a memory.
    persistent: learned tokens that attention sees before any other (Titans).
    epsilon: added to the mean square in every norm (Llama files give theirs).
    tied: the output head is the embedding.
    dtype: of activations and matmuls; states, norms and logits are float32.
    remat: what the backward pass recomputes per block: 'none', 'kernels'
      (keeps products of weights and what the kernels of memory and attention
      give), 'dots' (keeps products of weights), 'full' (all but the block's
      input) or 'offload' (as 'full', and the input waits in the host's
      memory). For levels that are learned in full see `cms.remat`.
    unroll: blocks that the compiler sees in one round of the loop over them;
      N leaves no loop, so that what the backward pass needs is not copied
      into stacks and out again, and takes longer to compile.
    memory: the self-referential memory (family hope); others fix parts of it,
      see `rule`.
    cms: the continuum of levels (families hope, hope_attention); in others
      nothing but the mixer's memory learns inside a sequence.
  """

  family: str = 'hope'
  V: int = 272
  D: int = 128
  N: int = 2
  H: int = 2
  K: int = 0
  G: int = 0
  F: int = 384
  window: int = 0
  rope_base: float = 10_000.0
  taps: int = 4
  persistent: int = 0
  epsilon: float = 1e-6
  tied: bool = True
  dtype: str = 'bfloat16'
  remat: str = 'none'
  unroll: int = 1
  memory: MemoryConfig = MemoryConfig()
  cms: CMSConfig = CMSConfig()

  def __post_init__(self):
    fields.check(self)
    for name, known in (
      ('family', FAMILIES),
      ('dtype', tuple(DTYPES)),
      ('remat', REMATS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f'{name}={getattr(self, name)!r}: one of {known}')
    for name in ('V', 'D', 'N', 'H', 'F', 'taps', 'unroll'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)}: at least 1')
    for name in ('K', 'G', 'window', 'persistent'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)}: 0 or more')
    if not self.rope_base > 0:
      raise ValueError(f'rope_base={self.rope_base}: above 0')
    if not 0 < self.epsilon < 1:
      raise ValueError(f'epsilon={self.epsilon}: above 0 and below 1')
    if not self.K and self.D % self.H:
      raise ValueError(
        f'width D={self.D} is not a multiple of H={self.H} heads; give a head '
        'width K or another H'
      )
    families.check(self)
    if FAMILY[self.family].rotates and self.head_width % 2:
      raise ValueError(
        f'head width {self.head_width}: rotary angles need an even one'
      )
    if self.H % self.kv_heads:
      raise ValueError(
        f'H={self.H} query heads cannot share G={self.G} key-value heads: G '
        'must divide H'
      )
    if self.cms.slots and self.cms.rank > self.D:
      raise ValueError(
        f'cms.rank={self.cms.rank} of an expert slot: at most the width '
        f'D={self.D}'
      )
    _ = self.schedule, self.groups

  @property
  def head_width(self) -> int:
    return self.K or self.D // self.H

  @property
  def kv_heads(self) -> int:
    return self.G or self.H

  @property
  def rule(self) -> MemoryConfig | None:
    """How the mixers' memory is written; None: the family has no memory."""
    return families.rule(self.family, self.memory)

  @property
  def learns(self) -> bool:
    """Whether the MLPs are levels, which may learn inside a sequence."""
    return FAMILY[self.family].learns

  @property
  def attends(self) -> bool:
    """Whether softmax attention is part of the mixers."""
    return FAMILY[self.family].attends

  @property
  def compute_dtype(self):
    return DTYPES[self.dtype]

  @property
  def schedule(self) -> Schedule:
    """The levels of a block; one that never commits is an ordinary MLP."""
    mlp = Schedule((Level(0, self.F),))
    if not self.learns:
      return mlp
    full = Schedule(tuple(Level(p, self.F) for p in self.cms.periods))
    if self.cms.assign == 'groups':
      return mlp
    if self.cms.width == 'full':
      return full
    return split_width(self.F, self.cms.periods, self.cms.multiple)

  @property
  def adapting(self) -> tuple[int, ...]:
    """The blocks whose levels learn inside a sequence, in order."""
    if not self.learns:
      return ()
    return self.cms.adapting(self.N)

  @property
  def stream(self) -> StreamConfig | None:
    """How levels learn inside a sequence; None if none does."""
    return self.cms.stream if self.adapting else None

  @property
  def groups(self) -> tuple[Group, ...]:
    """For each period, fastest first, the levels that have it."""
    return self.cms.groups(self.adapting)

  @property
  def segments(self) -> tuple[Segment, ...]:
    """Runs of equal blocks from the first one that learns, see `Segment`."""
    return self.cms.segments(self.adapting, self.N)

  @classmethod
  def from_dict(cls, values) -> 'ModelConfig':
    """Builds the config from nested mappings (a dict or ConfigDict).

    Raises:
      ValueError: for an unknown key, a value of another type, or values that
        do not fit together; the message names them.
    """
    return _build(cls, values, 'model')


def _build(cls, values, path: str):
  hints = typing.get_type_hints(cls)
  if not hasattr(values, 'keys'):
    raise ValueError(f'{path}={values!r}: a mapping of names to values wanted')
  unknown = sorted(set(values.keys()) - set(hints))
  if unknown:
    raise ValueError(
      f'{path}: unknown {", ".join(unknown)}; known: {", ".join(hints)}'
    )
  made = {
    name: _convert(hints[name], value, f'{path}.{name}')
    for name, value in values.items()
  }
  try:
    return cls(**made)
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from None


def _convert(hint, value, path: str):
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else _build(hint, value, path)
  origin = typing.get_origin(hint)
  if origin is tuple:
    if isinstance(value, str) or not hasattr(value, '__iter__'):
      raise ValueError(f'{path}={value!r}: a tuple is wanted')
    item = typing.get_args(hint)[0]
    return tuple(_convert(item, v, path) for v in value)
  assert not isinstance(hint, types.UnionType), hint
  if hint is float and type(value) is int:
    value = float(value)
  if type(value) is not hint:
    raise ValueError(
      f'{path}={value!r}: a {hint.__name__} is wanted, not a '
      f'{type(value).__name__}'
    )
  return value
