"""Where a model comes from: a line for every night, in one JSON lines file."""

import dataclasses
import datetime
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from nestax.sleep.cycle import Night
from nestax.sleep.tools import CycleConfig


class LineageError(ValueError):
  """The lineage names no such version, or its file is damaged."""


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
    version = stamped(version)
    self.rewrite([*versions, version])
    return version

  def rewrite(self, versions: Iterable[Version]) -> None:
    """Makes these all lines there are: of a model that was restored."""
    lines = [json.dumps(dataclasses.asdict(v)) + '\n' for v in versions]
    temporary = self.path.with_name(f'{self.path.name}.{os.getpid()}.tmp')
    with temporary.open('w', encoding='utf-8') as file:
      file.writelines(lines)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(self.path)


def stamped(version: Version) -> Version:
  """The version with the time of now."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  return dataclasses.replace(version, time=now)


def version_of(
  number: int, parent: int, how: CycleConfig, slept: Night, checkpoint: str
) -> Version:
  """What a night is as a version.

  Args:
    number: of the version.
    parent: the newest accepted one before it; -1 for none.
    how: the night's config, written down with it.
    slept: the night.
    checkpoint: where its parameters are, if it was accepted.
  """
  seconds = {f'seconds {k}': v for k, v in slept.seconds.items()}
  accepted = slept.decision.accepted
  return Version(
    number,
    parent,
    dataclasses.asdict(how),
    slept.metrics | seconds,
    accepted,
    slept.decision.reason,
    checkpoint if accepted else '',
  )


def record(
  lineage: Lineage,
  how: CycleConfig,
  slept: Night,
  save: Callable[[int, Any], str],
) -> Version:
  """Makes the night a version: its checkpoint, then its line.

  Args:
    lineage: of the model; the newest accepted version is the parent.
    how: the night's config, written down with it.
    slept: the night.
    save: `(version, params) -> path`, returns when all is on disk; called
      for an accepted night only.
  """
  versions, parent = lineage.versions(), lineage.current()
  number = len(versions)
  path = save(number, slept.params) if slept.decision.accepted else ''
  before = parent.version if parent else -1
  return lineage.add(version_of(number, before, how, slept, path))
