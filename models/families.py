"""What each family is made of: its memory's rule, and the keys that it reads.

The linear recurrences are the memory of `models.memory` with parts left out:
`mem` alone writes, with slow keys, values and gates (`ALONE`).
"""

import dataclasses
from typing import NamedTuple

from nestax.models.memory.types import MemoryConfig


class Family(NamedTuple):
  """One family of models.

  Attributes:
    rule: what its memory is, whatever the config says; None: has no memory.
    memory: keys of `model.memory` that it reads; None: any may be set.
    model: of the keys OPTIONAL, those that it reads.
    initial: its memory starts from learned values, not from zero.
    attends: softmax attention is part of it.
    rotates: rotary angles are, so that heads have to be of even width.
    learns: its MLPs are a continuum of levels, which may learn as they read.
  """

  rule: dict | None
  memory: tuple[str, ...] | None = ()
  model: tuple[str, ...] = ()
  initial: bool = False
  attends: bool = False
  rotates: bool = False
  learns: bool = False


# Keys of a model that not every family reads.
OPTIONAL = ('G', 'window', 'rope_base', 'taps', 'persistent')
ANY = ('G', 'window', 'rope_base', 'taps')  # all but persistent
ATTENTION = ('G', 'window', 'rope_base')
ALONE = {
  'adaptive': (),
  'identity': (),
  'generated': False,
  'value_norm': False,
}
# The value is added, not regressed to: no boundary is read.
LINEAR = ALONE | {'objective': 'dot', 'given': ('eta', 'alpha')}
PLAIN = LINEAR | {'delta': False, 'key_norm': False}
TITANS = ALONE | {'delta': False, 'momentum': True, 'given': ('eta', 'alpha')}
TTT = ALONE | {
  'delta': False,
  'retention': False,
  'identity': ('mem',),
  'given': ('eta',),
}
RUNNING = ('chunk_mem', 'remat', 'stride', 'implementation', 'twice')
REGRESSING = (*RUNNING, 'eta_max', 'read')
DEEP = ('expansion', 'bounded')
MEMORY = (*REGRESSING, *DEEP, 'depth_mem', 'anchor')
# walked segment by segment, by a scan of its own
SEGMENTS = ('chunk_mem', 'eta_max', 'read', *DEEP, 'depth_mem', 'anchor')
# a memory and window attention beside it
BESIDE = {
  'model': (*ATTENTION, 'taps', 'persistent'),
  'initial': True,
  'attends': True,
  'rotates': True,
}
WINDOWED = ('titans_mag', 'titans_mal', 'samba')

FAMILY = {
  'hope': Family({}, None, ANY, initial=True, learns=True),
  'hope_attention': Family(
    None, None, ANY, attends=True, rotates=True, learns=True
  ),
  'transformer': Family(None, None, ANY, attends=True, rotates=True),
  'deltanet': Family(
    LINEAR | {'retention': False, 'given': ('eta',)}, RUNNING, ('taps',)
  ),
  'gated_deltanet': Family(LINEAR, RUNNING, ('taps',)),
  'retnet': Family(PLAIN, RUNNING, ('rope_base',), rotates=True),
  'mamba2': Family(PLAIN, RUNNING, ('taps',)),
  'titans': Family(TITANS, MEMORY, ('taps',), initial=True),
  'titans_mac': Family(
    TITANS,
    SEGMENTS,
    ('rope_base', 'persistent'),
    initial=True,
    attends=True,
    rotates=True,
  ),
  'titans_mag': Family(TITANS, MEMORY, **BESIDE),
  'titans_mal': Family(TITANS, MEMORY, **BESIDE),
  'ttt_linear': Family(
    TTT | {'depth_mem': 1}, REGRESSING, ('taps',), initial=True
  ),
  'ttt_mlp': Family(
    TTT | {'depth_mem': 2}, (*REGRESSING, *DEEP), ('taps',), initial=True
  ),
  'samba': Family(
    PLAIN, RUNNING, (*ATTENTION, 'taps'), attends=True, rotates=True
  ),
}
FAMILIES = tuple(FAMILY)


def rule(family: str, memory: MemoryConfig) -> MemoryConfig | None:
  """The rule by which a family's memory is written; None: it has none."""
  fixed = FAMILY[family].rule
  if not fixed:
    return memory if fixed is not None else None
  return dataclasses.replace(memory, chunk_rest=memory.chunk_mem, **fixed)


def check(cfg) -> None:
  """Refuses what a family would not read.

  Args:
    cfg: a `models.config.ModelConfig`.

  Raises:
    ValueError: naming the family, the key, and what it has to be.
  """
  family = FAMILY[cfg.family]
  for key in OPTIONAL:
    if key not in family.model:
      _same(cfg, cfg, key, key)
  if family.memory is not None:
    ends = cfg.memory.chunk_rest
    if ends != cfg.memory.chunk_mem:
      _same(cfg, cfg.memory, 'chunk_rest', 'memory.chunk_rest')
    for key in (field.name for field in dataclasses.fields(MemoryConfig)):
      if key not in ('chunk_rest', *family.memory):
        _same(cfg, cfg.memory, key, f'memory.{key}')
    for key in ('blocks', 'slots'):
      _same(cfg, cfg.cms, key, f'cms.{key}')
  if cfg.family in WINDOWED and not cfg.window:
    raise ValueError(
      f'window=0: the family {cfg.family!r} has attention over a window beside '
      'a memory of all; give at least 1'
    )


def _same(cfg, part, key: str, name: str) -> None:
  """Refuses a key of a part of the config that is not at its default."""
  default = next(f.default for f in dataclasses.fields(part) if f.name == key)
  value = getattr(part, key)
  if value != default:
    raise ValueError(
      f'{name}={value!r}: a model of the family {cfg.family!r} does not read '
      f'it; leave it at {default!r}'
    )
