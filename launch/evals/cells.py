"""Results kept one file a cell, so that a comparison goes on where it was."""

import json
import os
import pathlib
import secrets
from collections.abc import Mapping, Sequence

from nestax.launch.configs import common


class CellError(ValueError):
  """A file holds the results of something else."""


def write(path: pathlib.Path, key: dict, rows: list[dict]) -> None:
  """Puts a cell down whole or not at all.

  Args:
    path: of the file; its folder is made.
    key: what the rows are results of.
    rows: plain dicts, one a line after the key's.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  whole(path, ''.join(json.dumps(row) + '\n' for row in [key, *rows]))


def whole(path: pathlib.Path, text: str) -> None:
  """Puts a text down whole or not at all, whoever else does."""
  # processes of two machines can have one number
  fresh = path.with_suffix(f'.{os.getpid()}-{secrets.token_hex(4)}')
  try:
    fresh.write_text(text, encoding='utf-8')
    fresh.replace(path)
  finally:
    fresh.unlink(missing_ok=True)


def read(path: pathlib.Path, key: dict | None = None) -> list[dict] | None:
  """Reads a cell's rows; None if there is no such file.

  Raises:
    CellError: if a key is given and the file's is another.
  """
  if not path.exists():
    return None
  there, rows = load(path)
  if key is not None:
    _check_same(path, there, key)
  return rows


def so_far(
  path: pathlib.Path, key: dict, more: bool
) -> tuple[list[dict], bool]:
  """A cell's rows, one a seed, and whether they are all.

  Args:
    path: of the file; without one there are no rows.
    key: of the cell.
    more: rows of fewer seeds can be added to.

  Raises:
    CellError: if the file's key is another, or it is damaged.
  """
  if not path.exists():
    return [], False
  there, rows = load(path)
  fewer = there.get('seeds', 0) < key.get('seeds', 0)
  if not (more and fewer and _but_seeds(there) == _but_seeds(key)):
    _check_same(path, there, key)
  seeds = there.get('seeds', len(rows))
  if len(rows) != seeds or not rows:
    raise _damaged(path, f'rows: {len(rows)}, seeds: {seeds}')
  return rows, there == key


def _check_same(path: pathlib.Path, there: dict, key: dict) -> None:
  if there == key:
    return
  if _but_seeds(there) == _but_seeds(key):
    raise CellError(
      f'{path} holds results of {there.get("seeds")} seeds, asked for are '
      f'{key.get("seeds")}: none is taken away, and some are added where '
      'there is one rate (--rates) or runs are apart '
      '(--set=EVALUATION.train.apart=true); give another workdir'
    )
  found = common.unequal(common.flat(there), common.flat(key))
  raise CellError(
    f'{path} holds results of other settings: {"; ".join(found.values())}. '
    'Give another workdir'
  )


def _damaged(path: pathlib.Path, why) -> CellError:
  return CellError(
    f'{path} is damaged ({why}): remove it, and it is made again'
  )


def _but_seeds(key: dict) -> dict:
  return {name: value for name, value in key.items() if name != 'seeds'}


def load(path: pathlib.Path) -> tuple[dict, list[dict]]:
  """Reads a cell's key and rows.

  Raises:
    CellError: for a file that is damaged.
  """
  try:
    lines = [*map(json.loads, path.read_text(encoding='utf-8').splitlines())]
  except ValueError as error:
    raise _damaged(path, error) from error
  if not lines or not all(isinstance(line, dict) for line in lines):
    raise _damaged(path, 'not a key and its rows')
  key, *rows = lines
  return key, rows


def same(found: Mapping[pathlib.Path, dict], names: Sequence[str]) -> None:
  """Refuses cells that are not results of the same settings.

  Args:
    found: keys by the files that hold them.
    names: of the settings that have to be equal.

  Raises:
    CellError: naming two files and what differs.
  """
  first, *others = sorted(found) or [None]
  for other in others:
    for name in names:
      a, b = found[first].get(name), found[other].get(name)
      if a != b:
        raise CellError(
          f'{first} is of {name}={a!r}, {other} of {name}={b!r}: they do not '
          'make one table; run the older one again in another workdir'
        )
