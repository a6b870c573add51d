"""The end of a night: is the new version good enough to wake up as?

A night is accepted if the core has not lost more than a margin, and what the
day brought has not got worse than the model without the night would be. Each
decision is one line of the lineage, a JSON lines file.
"""

import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nestax.sleep import reader as readers
from nestax.sleep.reader import Reader


class LineageError(ValueError):
  """The lineage names no such version, or its file is damaged."""


@dataclasses.dataclass(frozen=True)
class GateConfig:
  """Margins, relative to the loss before the night.

  Attributes:
    core: greatest rise of the loss on the core set.
    day: least fall of the loss on the day's own content, against the same
      model with its fast levels reset and no night; negative allows a rise.
  """

  core: float = 0.01
  day: float = 0.0

  def __post_init__(self):
    if not 0 <= self.core < math.inf:
      raise ValueError(f'core={self.core}: 0 or more, and finite')
    if not -1 <= self.day < 1:
      raise ValueError(f'day={self.day}: from -1 to below 1')


@dataclasses.dataclass(frozen=True)
class Decision:
  """What the gate says; `reason` is for people."""

  accepted: bool
  reason: str


@functools.partial(jax.jit, static_argnums=0)
def _nats(reader: Reader, params, context, tokens_BxL, length_B):
  logits = readers.score(reader, params, context, tokens_BxL)
  logs = jax.nn.log_softmax(logits)
  target_BxL = tokens_BxL[:, 1:, None]
  nats_BxL = -jnp.take_along_axis(logs, target_BxL, -1)[..., 0]
  place_1xL = jnp.arange(1, tokens_BxL.shape[1])[None]
  mask_BxL = place_1xL < length_B[:, None]
  return jnp.where(mask_BxL, nats_BxL, 0.0).sum(1), mask_BxL.sum(1)


def row_losses(reader: Reader, params, context, tokens_BxL, length_B):
  """Mean nats a token of each row after its first, float `[B]`.

  Rows are texts of their own, levels frozen; a row of one token has loss 0.
  """
  nats_B, count_B = _nats(reader, params, context, tokens_BxL, length_B)
  return np.asarray(nats_B) / np.maximum(np.asarray(count_B), 1)


def loss(
  reader: Reader, params, context, tokens_NxL, length_N, rows: int = 8
) -> float:
  """Mean nats a token over a set of texts, read `rows` at a time.

  One program whatever their number: the last batch is filled with rows that
  do not count. With a context of owners, `rows` must be a multiple of theirs,
  and the texts in an order that gives each batch owner by owner.
  """
  nats = count = 0.0
  for start in range(0, len(tokens_NxL), rows):
    part = np.asarray(tokens_NxL[start : start + rows])
    missing = rows - len(part)
    part = np.pad(part, ((0, missing), (0, 0)))
    length = np.pad(np.asarray(length_N[start : start + rows]), (0, missing))
    a, b = _nats(reader, params, context, jnp.asarray(part), length)
    nats, count = nats + float(a.sum()), count + float(b.sum())
  return nats / max(count, 1.0)


def decide(cfg: GateConfig, before: dict, after: dict) -> Decision:
  """Compares losses `core` and `day` before and after a night.

  `before['day']` is of the model as it would be without the night: fast
  levels reset. What is not finite is never accepted.
  """
  for name, value in after.items():
    if not math.isfinite(value):
      return Decision(False, f'rolled back: {name} is {value} after the night')
  rise = after['core'] / before['core'] - 1
  if rise > cfg.core:
    return Decision(
      False,
      f'rolled back: the core loss rose by {rise:.2%} ({before["core"]:.4f} to '
      f'{after["core"]:.4f}), more than {cfg.core:.2%}',
    )
  fall = 1 - after['day'] / before['day']
  if fall < cfg.day:
    return Decision(
      False,
      f"rolled back: the loss on the day's content fell by {fall:.2%} "
      f'({before["day"]:.4f} to {after["day"]:.4f}), less than {cfg.day:.2%}',
    )
  return Decision(
    True,
    f"accepted: core loss {rise:+.2%}, loss on the day's content {-fall:+.2%}",
  )


@dataclasses.dataclass(frozen=True)
class Version:
  """One line of the lineage.

  Attributes:
    version: number of the night, 0 for the model that never slept.
    parent: version that it came from; -1 for none.
    config: of the night, plain values.
    metrics: what was measured, plain values.
    accepted: whether the gate let it through.
    reason: the gate's words.
    checkpoint: where its parameters are; '' if it was rolled back.
    time: UTC, ISO 8601.
  """

  version: int
  parent: int
  config: dict[str, Any]
  metrics: dict[str, Any]
  accepted: bool
  reason: str
  checkpoint: str = ''
  time: str = ''


class Lineage:
  """Every night there was, in one file that a person can read."""

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)

  def versions(self) -> list[Version]:
    """All lines, oldest first.

    Raises:
      LineageError: naming the line that cannot be read.
    """
    if not self.path.exists():
      return []
    versions = []
    lines = self.path.read_text(encoding='utf-8').splitlines()
    for number, line in enumerate(lines, 1):
      try:
        versions.append(Version(**json.loads(line)))
      except (TypeError, json.JSONDecodeError) as error:
        raise LineageError(
          f'{self.path}, line {number}: not a line of a lineage ({error})'
        ) from error
    return versions

  def current(self) -> Version | None:
    """The newest accepted version."""
    accepted = [v for v in self.versions() if v.accepted]
    return accepted[-1] if accepted else None

  def add(self, version: Version) -> Version:
    """Appends a line, whole or not at all; gives it a time.

    Raises:
      LineageError: if its number is not the next one, or its parent no
        accepted version.
    """
    versions = self.versions()
    if version.version != len(versions):
      raise LineageError(
        f'version {version.version} cannot follow the {len(versions)} in '
        f'{self.path}: the next is {len(versions)}'
      )
    parents = {v.version for v in versions if v.accepted} | {-1}
    if version.parent not in parents:
      raise LineageError(
        f'version {version.version} comes from {version.parent}, which is no '
        f'accepted version in {self.path}'
      )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    version = dataclasses.replace(version, time=now)
    lines = [dataclasses.asdict(v) for v in [*versions, version]]
    temporary = self.path.with_name(f'{self.path.name}.{os.getpid()}.tmp')
    with temporary.open('w', encoding='utf-8') as file:
      file.writelines(json.dumps(line) + '\n' for line in lines)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(self.path)
    return version
