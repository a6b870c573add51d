"""What nights rehearse: texts of a kind that is to stay known, earlier days.

A night keeps what the slow weights say of these rows (`past` and `earlier` of
`owners.night`). All that is drawn follows from a life's seed and the number of
the night, so that a life that goes on rehearses the same.
"""

import os
from collections.abc import Collection, Sequence

import numpy as np

from nestax.launch import days, sampling
from nestax.launch.data.tokenizers import Tokenizer
from nestax.sleep import replay, texts
from nestax.sleep.reader import Said
from nestax.sleep.replay import Piece, Replay


def load(
  patterns: Sequence[str],
  core: Sequence[int],
  read: Sequence[days.Day],
  tokenizer: Tokenizer,
  length: int,
) -> Said:
  """Reads texts to rehearse, as rows of `length` tokens, numpy.

  Args:
    patterns: globs of files; one that is named twice is read once.
    core: ids of the core set, which says nothing if it is rehearsed.
    read: the days, which a night could not learn if it rehearsed them.
    tokenizer: of the model.
    length: tokens of a row; what does not fill one is left out.

  Raises:
    FileNotFoundError: if a pattern matches nothing.
    ValueError: for a file that is a folder, no UTF-8, shorter than a row, or
      has the text of the core set or of a day.
  """
  found = [x for word in patterns for x in days.match('rehearse', word)]
  each = [np.zeros((0, length), np.int32)]
  for path in dict.fromkeys(map(os.path.realpath, found)):
    if os.path.isdir(path):
      raise ValueError(f'--rehearse={path} is a folder: give files')
    ids = _encoded(tokenizer, path)
    each.append(_cut(ids, path, length, 0))
    if not (text := _text(tokenizer, ids)):
      raise ValueError(f'--rehearse={path}: nothing to read in it')
    if _share(text, _text(tokenizer, core)):
      raise ValueError(
        f'--rehearse={path} has the text of --core, which is to tell whether '
        'nights cost anything: give other texts of the kind'
      )
    for name in days.owners(read):
      parts = [day.tokens[name] for day in read if name in day.tokens]
      # a day shorter than a row may stand anywhere
      long = [_text(tokenizer, x) for x in parts if len(x) >= length]
      whole = _text(tokenizer, np.concatenate(parts))
      if text in whole or any(day in text for day in long):
        raise ValueError(
          f'--rehearse={path} is what {name} reads, which nights are to learn: '
          'give texts that are known already'
        )
  return said(np.concatenate(each))


def _text(tokenizer: Tokenizer, ids) -> bytes:
  """What ids say; those of a part of a text may be other ones than there."""
  return b''.join([tokenizer.pieces[i] for i in ids]).strip()


def _share(a: bytes, b: bytes) -> bool:
  return a in b or b in a


def cut(tokenizer: Tokenizer, path: str, length: int, count: int = 0):
  """Cuts a text into rows: all of it, or `count` of them from its middle.

  Raises:
    ValueError: if it is shorter than that, or than one row.
  """
  return _cut(_encoded(tokenizer, path), path, length, count)


def _encoded(tokenizer: Tokenizer, path: str):
  text = sampling.read_prompt('', path, '--rehearse')
  return np.array(tokenizer.encode(text), np.int32)


def _cut(ids, path: str, length: int, count: int):
  rows = ids[: len(ids) // length * length].reshape(-1, length)
  least = max(count, 1)
  if len(rows) < least:
    needed = f'{least} times {length}' if least > 1 else f'a row of {length}'
    raise ValueError(f'{path}: {len(ids)} tokens, shorter than {needed} tokens')
  # a book begins and ends with other things
  first = (len(rows) - count) // 2 if count else 0
  return rows[first : first + (count or len(rows))]


def said(rows) -> Said:
  """Whole rows, of which all but the first token counts."""
  one = np.ones(len(rows), np.int32)
  return Said(rows, one, one * rows.shape[1])


def drawn(rehearsed: Said, count: int, seed: int, night: int) -> Said | None:
  """Draws a night's rows of texts to rehearse; None if there are none."""
  rng = np.random.default_rng((seed, night))
  return texts.joined([texts.some(rng, rehearsed, count)])


def earlier(
  held: Replay,
  names: Sequence[str],
  count: int,
  length: int,
  pad: int,
  seed: int,
  night: int,
) -> dict[str, Said]:
  """Draws a night's rows of each owner's earlier days, of all of them alike.

  Args:
    held: what `remember` has kept.
    names: the owners, in the order of the batch.
    count: rows of each.
    length: tokens of a row, at most.
    pad: id of what is after a text.
    seed: of the life.
    night: its number.
  """
  rows = {}
  for row, name in enumerate(names, 1):
    if name not in held.owners:
      continue
    rng = np.random.default_rng((seed, night, row))
    each = [_rows(p, length, pad) for p in _nights(held, name).values()]
    if (some := texts.joined(texts.earlier(each, count, rng))) is not None:
      rows[name] = some
  return rows


def remember(
  held: Replay, day: texts.Day, names: Collection[str], seed: int, night: int
) -> None:
  """Keeps what was slept on, to be rehearsed in the nights to come.

  Beyond the capacity rows go at random, always of the night that has most of
  them, so that no day is forgotten before the others.

  Args:
    held: of all nights before; changed.
    day: of the night.
    names: owners whose day was consolidated.
    seed: of the life.
    night: its number.
  """
  for row, name, read in zip(day.rows, day.names, day.read):
    if name not in names:
      continue
    nights = _nights(held, name) if name in held.owners else {}
    nights[f'night {night}'] = [
      Piece(name, tuple(map(int, tokens[:n])), mark=f'night {night}')
      for tokens, n in zip(read.tokens_BxL, read.length_B)
    ]
    rng = np.random.default_rng((seed, night, row + 1, 1))
    _put(held, name, nights, rng)


def bound(held: Replay, capacity: int, seed: int, night: int) -> None:
  """Sets the capacity, and thins what is held beyond it as `remember` does."""
  held.capacity = capacity
  for row, name in enumerate(held.owners, 1):
    if held.held(name) > capacity:
      rng = np.random.default_rng((seed, night, row, 2))
      _put(held, name, _nights(held, name), rng)


def _put(held: Replay, name: str, nights: dict[str, list[Piece]], rng) -> None:
  """Replaces what is held of an owner, thinned to the capacity."""
  size = {
    mark: sum(len(piece.tokens) for piece in pieces)
    for mark, pieces in nights.items()
  }
  while sum(size.values()) > held.capacity:
    most = max(size, key=size.get)
    gone = nights[most].pop(rng.integers(len(nights[most])))
    size[most] -= len(gone.tokens)
  held.delete(name)
  for pieces in nights.values():
    for piece in pieces:
      held.add(piece)


def _nights(held: Replay, name: str) -> dict[str, list[Piece]]:
  """An owner's pieces by the night that they were slept on."""
  nights = {}
  for piece in held.pieces([name]):
    nights.setdefault(piece.mark, []).append(piece)
  return nights


def _rows(pieces: Sequence[Piece], length: int, pad: int) -> Said:
  tokens, count, _ = replay.batch(pieces, length, pad)
  tokens, count = tokens[count > 1], count[count > 1]
  return Said(tokens, np.ones_like(count), count)
