"""Documents as days: what every owner reads, and when."""

import glob
import os
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nestax.launch import sampling
from nestax.launch.data.tokenizers import Tokenizer

READER = 'reader'  # whoever reads where every file is a day


class Day(NamedTuple):
  """What is read between two nights, or more of them."""

  name: str
  tokens: dict[str, np.ndarray]  # by owner, int32 [n]


class Call(NamedTuple):
  """What one call of the model reads."""

  tokens_BxL: np.ndarray  # int32; zeros where an owner has none
  reads_B: np.ndarray  # bool, who has


def load(
  patterns: Sequence[str], count: int, tokenizer: Tokenizer
) -> tuple[Day, ...]:
  """Reads the days.

  Args:
    patterns: globs. Folders are days, and the files in them owners. Files are
      owners if `count` is given, else days of one reader. Days come as they are
      given, and those that one glob finds in the order of their names.
    count: days that each file is cut into, equally; 0 for a file a day.
    tokenizer: of the model.

  Raises:
    FileNotFoundError: if a pattern matches nothing.
    ValueError: in words, for what cannot be days.
  """
  if count < 0:
    raise ValueError(f'--days={count}: 0 for a file a day, or more')
  paths = [path for pattern in patterns for path in match('text', pattern)]
  if not paths:
    raise ValueError('no text to read: give --text=FILES')
  folders = [os.path.isdir(path) for path in paths]
  if any(folders) and not all(folders):
    raise ValueError(
      f'{paths[folders.index(True)]} is a folder and '
      f'{paths[folders.index(False)]} a file: give folders, which are days, or '
      'files'
    )
  if any(folders):
    if count:
      raise ValueError(f'--days={count} is for files; a folder is a day')
    return tuple(
      Day(name, _owners(sorted(_files(path)), tokenizer))
      for name, path in _named(paths).items()
    )
  if not count:
    owners = _owners(paths, tokenizer)
    return tuple(Day(name, {READER: ids}) for name, ids in owners.items())
  parts = {
    name: np.array_split(ids, count)
    for name, ids in _owners(paths, tokenizer).items()
  }
  return tuple(
    Day(str(i + 1), {name: part[i] for name, part in parts.items()})
    for i in range(count)
  )


def match(flag: str, pattern: str) -> list[str]:
  """The paths that a flag's glob stands for, day2 before day10.

  Raises:
    FileNotFoundError: if there are none.
  """
  found = sorted(glob.glob(os.path.expanduser(pattern)), key=_in_order)
  if not found:
    raise FileNotFoundError(f'--{flag}={pattern}: there is no such file')
  return found


def _in_order(path: str) -> list:
  # words and numbers in turn
  parts = re.split(r'(\d+)', os.path.splitext(path)[0])
  return [int(x) if i % 2 else x for i, x in enumerate(parts)]


def _files(folder: str) -> list[str]:
  found = [p for p in pathlib.Path(folder).iterdir() if p.is_file()]
  found = [str(p) for p in found if not p.name.startswith('.')]
  if not found:
    raise ValueError(f'{folder}: a day without a file to read')
  return found


def _named(paths: Sequence[str]) -> dict[str, str]:
  names = [pathlib.Path(path).stem for path in paths]
  check_names(names, 'files to read')
  return dict(zip(names, paths))


def check_names(names: Sequence[str], what: str) -> None:
  """Raises a ValueError if two of them are the same."""
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(f'{twice[0]!r} is the name of two of the {what}')


def _owners(paths, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
  read = {}
  for name, path in _named(paths).items():
    text = sampling.read_prompt('', path, '--text')
    if not text.strip():
      raise ValueError(f'{path}: nothing to read in it')
    read[name] = np.asarray(tokenizer.document(text)[0], np.int32)
  return read


def owners(days: Sequence[Day]) -> tuple[str, ...]:
  """All who read on any day, in the order of their names."""
  return tuple(sorted({name for day in days for name in day.tokens}))


def mark(day: Day) -> dict[str, int]:
  """A checksum of what each owner reads."""
  return {name: zlib.crc32(ids.tobytes()) for name, ids in day.tokens.items()}


def left(
  day: Day, names: Sequence[str], done: dict[str, int], readings: int = 1
) -> list[int]:
  """Tokens that each of the owners has not read yet, in so many readings."""
  return [
    max(0, readings * len(day.tokens.get(name, ())) - done.get(name, 0))
    for name in names
  ]


def call(
  day: Day,
  names: Sequence[str],
  done: dict[str, int],
  piece: int,
  readings: int = 1,
) -> Call | None:
  """What is read next: whole pieces, then what is left token by token.

  Two shapes, whatever the lengths, so that two programs read every day. A piece
  may end one reading and begin the next.

  Args:
    day: the day.
    names: the owners, in the order of the batch; others do not read.
    done: tokens that each has read of it, all readings together.
    piece: tokens of a whole piece.
    readings: how often all of it is read, one after the other.

  Returns:
    The call, or None when all is read.
  """
  rest_B = np.array(left(day, names, done, readings))
  if not (rest_B > 0).any():
    return None
  width = piece if (rest_B >= piece).any() else 1
  reads_B = rest_B >= width
  tokens = np.zeros((len(names), width), np.int32)
  for row in np.flatnonzero(reads_B):
    ids = day.tokens[names[row]]
    place = done.get(names[row], 0) + np.arange(width)
    tokens[row] = ids[place % len(ids)]
  return Call(tokens, reads_B)
