"""Results kept one file a cell, so that a comparison goes on where it was."""

import json
import os
import pathlib
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
  fresh = path.with_suffix(f'.{os.getpid()}')
  fresh.write_text(text, encoding='utf-8')
  fresh.replace(path)


def read(path: pathlib.Path, key: dict | None = None) -> list[dict] | None:
  """Reads a cell's rows; None if there is no such file.

  Raises:
    CellError: if a key is given and the file's is another.
  """
  if not path.exists():
    return None
  there, rows = load(path)
  if key is not None and there != key:
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
  return rows


def fewer(path: pathlib.Path, key: dict) -> list[dict] | None:
  """Rows of the first seeds, if a file is of fewer and else of the same.

  Raises:
    CellError: for a file that is damaged.
  """
  if not path.exists():
    return None
  there, rows = load(path)
  seeds = there.get('seeds', 0)
  if _but_seeds(there) != _but_seeds(key) or seeds >= key.get('seeds', 0):
    return None
  if len(rows) != seeds:
    raise _damaged(path, f'rows: {len(rows)}, seeds: {seeds}')
  return rows


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
    key, *rows = map(json.loads, path.read_text().splitlines())
  except ValueError as error:  # no line at all, or no JSON
    raise _damaged(path, error) from error
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
