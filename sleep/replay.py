"""What was read since the last sleep: bounded, per owner, to be forgotten.

A night goes on from pieces of it. An owner's pieces go when the owner goes;
what a filter refuses stays in the fast levels, which are reset, and never
reaches a slower one.
"""

import dataclasses
import json
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np

Predicate = Callable[['Piece'], bool]


class ReplayError(ValueError):
  """The buffer has nothing to give, or its file is not one."""


@dataclasses.dataclass(frozen=True)
class Piece:
  """A run of tokens that one owner's sequence has read.

  Attributes:
    owner: whose it is.
    tokens: ids, in order; an array or list becomes a tuple.
    surprise: mean nats a token when it was read; NaN if nobody has measured.
    mark: the caller's own word, such as the document or the day.
  """

  owner: str
  tokens: tuple[int, ...]
  surprise: float = float('nan')
  mark: str = ''

  def __post_init__(self):
    if isinstance(self.tokens, tuple):
      return
    ids = np.asarray(self.tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in 'iu'):
      raise ReplayError(
        f'tokens of the shape {ids.shape} and type {ids.dtype}: a row of whole '
        'numbers is wanted'
      )
    object.__setattr__(self, 'tokens', tuple(ids.tolist()))


class Replay:
  """The last `capacity` tokens of every owner, in pieces.

  The oldest pieces go first; a piece longer than the capacity keeps its end.
  """

  def __init__(self, capacity: int):
    """Makes an empty one.

    Raises:
      ReplayError: for a capacity below 1.
    """
    if capacity < 1:
      raise ReplayError(f'a capacity of {capacity} tokens an owner: at least 1')
    self.capacity = capacity
    self._pieces: dict[str, deque[Piece]] = {}

  def add(self, piece: Piece) -> None:
    """Remembers a piece, and forgets the owner's oldest beyond the capacity."""
    if not piece.tokens:
      return
    if len(piece.tokens) > self.capacity:
      tokens = piece.tokens[-self.capacity :]
      piece = dataclasses.replace(piece, tokens=tokens)
    pieces = self._pieces.setdefault(piece.owner, deque())
    pieces.append(piece)
    while self.held(piece.owner) > self.capacity:
      pieces.popleft()

  def extend(self, piece: Piece) -> None:
    """Remembers a piece as a part of the owner's last one, if marked alike."""
    pieces = self._pieces.get(piece.owner)
    if not pieces or pieces[-1].mark != piece.mark:
      self.add(piece)
      return
    last = pieces.pop()
    n, more = len(last.tokens), len(piece.tokens)
    mean = (last.surprise * n + piece.surprise * more) / (n + more)
    tokens = (*last.tokens, *piece.tokens)
    self.add(Piece(piece.owner, tokens, mean, piece.mark))

  def held(self, owner: str) -> int:
    """Tokens of an owner."""
    return sum(len(p.tokens) for p in self._pieces.get(owner, ()))

  @property
  def owners(self) -> list[str]:
    return sorted(self._pieces)

  def pieces(self, owners: Iterable[str] | None = None) -> list[Piece]:
    """The pieces of some owners, or of all, each owner's oldest first.

    Raises:
      ReplayError: for an owner of whom there is nothing.
    """
    owners = self.owners if owners is None else list(owners)
    for owner in owners:
      if owner not in self._pieces:
        raise ReplayError(f'nothing of owner {owner!r} in the replay buffer')
    return [piece for owner in owners for piece in self._pieces[owner]]

  def delete(self, owner: str) -> None:
    """Forgets all of an owner, along with the owner's state; fine if none."""
    self._pieces.pop(owner, None)

  def clear(self) -> None:
    """Forgets everything: a sleep has ended."""
    self._pieces.clear()

  def rows(self) -> list[dict]:
    """Plain values: the capacity, then a row a piece."""
    rows = [dataclasses.asdict(piece) for piece in self.pieces()]
    for row in rows:
      if np.isnan(row['surprise']):
        row['surprise'] = None
    return [{'capacity': self.capacity}, *rows]

  @classmethod
  def of_rows(cls, rows: Iterable[dict]) -> 'Replay':
    """Undoes `rows`.

    Raises:
      ReplayError: naming the row, from 1, that is none of a buffer.
    """
    replay, number = None, 0
    try:
      for number, row in enumerate(rows, 1):  # noqa: B007
        if replay is None:
          replay = cls(row['capacity'])
          continue
        surprise = row['surprise']
        surprise = float('nan') if surprise is None else surprise
        tokens = tuple(row['tokens'])
        replay.add(Piece(**row | {'surprise': surprise, 'tokens': tokens}))
    except (TypeError, KeyError) as error:
      raise ReplayError(
        f'line {number}: not a line of a replay buffer ({error})'
      ) from error
    if replay is None:
      raise ReplayError('line 1: not a line of a replay buffer (empty)')
    return replay

  def save(self, path: str | os.PathLike) -> None:
    """Writes one JSON line a piece, whole or not at all."""
    path = pathlib.Path(path)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    with temporary.open('w', encoding='utf-8') as file:
      file.writelines(json.dumps(row) + '\n' for row in self.rows())
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Replay':
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: if there is no such file.
      ReplayError: naming the line that is none of a buffer.
    """
    rows = []
    lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
    for number, line in enumerate(lines, 1):
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError as error:
        raise ReplayError(
          f'{path}, line {number}: not a line of a replay buffer ({error})'
        ) from error
    try:
      return cls.of_rows(rows)
    except ReplayError as error:
      raise ReplayError(f'{path}, {error}') from error


def batch(pieces: Iterable[Piece], length: int, pad: int):
  """Pieces as rows of tokens, cut into as many as they need.

  Returns:
    (tokens int32 `[n, length]`, number that counts int32 `[n]`, index of the
    piece each row comes from).

  Raises:
    ReplayError: if there are none.
  """
  rows, counts, origin = [], [], []
  for i, piece in enumerate(pieces):
    for start in range(0, len(piece.tokens), length):
      part = piece.tokens[start : start + length]
      rows.append(np.pad(part, (0, length - len(part)), constant_values=pad))
      counts.append(len(part))
      origin.append(i)
  if not rows:
    raise ReplayError('no pieces: nothing was read, or all was filtered out')
  return (
    np.stack(rows).astype(np.int32),
    np.array(counts, np.int32),
    np.array(origin),
  )


def surprising(most: float, least: float = 0.0) -> Predicate:
  """Keeps pieces whose surprise when read is within bounds, nats a token.

  What is close to what random tokens would cost is noise; what is below
  `least` is known already. A piece that nobody has measured is refused.
  """

  def keep(piece: Piece) -> bool:
    return bool(least <= piece.surprise <= most)

  return keep


def agreeing(
  score: Callable[[list[Piece]], Iterable[float]],
  pieces: list[Piece],
  worst: float,
) -> Predicate:
  """Keeps pieces that the slow levels do not contradict.

  Args:
    score: how far each piece is from what the slow levels hold, such as their
      mean nats a token without any fast level (`loss` of `sleep/gate.py`).
    pieces: those that will be asked about, scored together, once.
    worst: a piece above it is refused, and one whose score is not a number.

  Raises:
    ReplayError: if there are not as many scores as pieces.
  """
  scores = [float(x) for x in score(pieces)]
  if len(scores) != len(pieces):
    raise ReplayError(f'{len(scores)} scores of {len(pieces)} pieces')
  good = {id(p) for p, x in zip(pieces, scores) if x <= worst}
  return lambda piece: id(piece) in good


def consolidated(
  pieces: Iterable[Piece], *predicates: Predicate
) -> Iterator[Piece]:
  """The pieces that every predicate keeps."""
  return (p for p in pieces if all(keep(p) for keep in predicates))
