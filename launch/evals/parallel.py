"""Sentences in two languages, from CLDF data sets, tables or JSON lines."""

import csv
import json
import os
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

_TERMS = 'http://cldf.clld.org/v1.0/terms.rdf#'


class Pair(NamedTuple):
  """A sentence and its translation."""

  source: str
  target: str


def read(path, source: str = 'source', target: str = 'target') -> list[Pair]:
  """Reads sentence pairs; those that lack a side are left out.

  Args:
    path: a folder or *-metadata.json of a CLDF data set with examples; a .tsv
      or .csv with a line of names first; a .jsonl.
    source, target: names of the columns or keys; CLDF says its own.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: in words, for another kind of file or one without pairs.
  """
  path = pathlib.Path(os.path.expanduser(os.fspath(path)))
  if path.is_dir():
    found = sorted(path.glob('*-metadata.json'))
    if not found:
      raise ValueError(
        f'{path}: no *-metadata.json, so no CLDF data set; or give a .tsv, '
        '.csv or .jsonl'
      )
    path = found[0]
  if path.suffix == '.json':
    path, source, target = _examples(path)
  rows = _rows(path)
  try:
    pairs = [Pair(_plain(row[source]), _plain(row[target])) for row in rows]
  except KeyError as error:
    raise ValueError(f'{path}: there is no {error} in it') from None
  pairs = [pair for pair in pairs if pair.source and pair.target]
  if not pairs:
    raise ValueError(f'{path}: no pairs of sentences')
  return pairs


def _plain(text) -> str:
  return unicodedata.normalize('NFC', ' '.join((text or '').split()))


def _examples(path: pathlib.Path) -> tuple[pathlib.Path, str, str]:
  """The table of examples that CLDF metadata name, and its two columns."""
  try:
    tables = json.loads(path.read_text(encoding='utf-8'))['tables']
  except (KeyError, TypeError, json.JSONDecodeError):
    raise ValueError(f'{path}: not the metadata of a CLDF data set') from None
  for table in tables:
    if table.get('dc:conformsTo') != f'{_TERMS}ExampleTable':
      continue
    names = {
      column.get('propertyUrl'): column['name']
      for column in table['tableSchema']['columns']
    }
    sides = [names.get(f'{_TERMS}{x}') for x in _SIDES]
    if None in sides:
      raise ValueError(f'{path}: its examples lack {" or ".join(_SIDES)}')
    return path.parent / table['url'], *sides
  raise ValueError(f'{path}: the data set has no examples')


_SIDES = ('primaryText', 'translatedText')


def _rows(path: pathlib.Path) -> list[dict]:
  if path.suffix not in ('.csv', '.tsv', '.jsonl'):
    raise ValueError(f'{path}: CLDF, .tsv, .csv or .jsonl is wanted')
  with open(path, encoding='utf-8', newline='') as file:
    if path.suffix == '.jsonl':
      try:
        return [json.loads(line) for line in file if line.strip()]
      except json.JSONDecodeError as error:
        raise ValueError(f'{path}: not JSON lines ({error})') from None
    split = '\t' if path.suffix == '.tsv' else ','
    return list(csv.DictReader(file, delimiter=split))


def bare(text: str) -> str:
  """A sentence's letters and digits: what makes two of them the same."""
  return ''.join(c for c in text.casefold() if c.isalnum())


def split(
  pairs: Sequence[Pair], tests: int, rng, seen: str = ''
) -> tuple[list[Pair], list[Pair]]:
  """Splits into pairs to learn and pairs to ask, no sentence in both.

  Of pairs that share a side only the first is kept. What stands in `seen`,
  such as a grammar that is read too, is not asked.

  Args:
    pairs: all there are.
    tests: how many to ask.
    rng: of the choice.
    seen: a text.

  Raises:
    ValueError: if there are too few.
  """
  sides, kept = set(), []
  for pair in pairs:
    mine = {(i, bare(text)) for i, text in enumerate(pair)}
    if not mine & sides:
      kept.append(pair)
    sides |= mine
  seen = bare(seen)
  known = [bool(seen) and bare(pair.source) in seen for pair in kept]
  order = rng.permutation(len(kept))
  unseen = [i for i in order if not known[i]]
  if not 0 < tests < len(kept) or tests > len(unseen):
    raise ValueError(
      f'tests={tests}: of {len(kept)} different pairs {len(unseen)} can be '
      'asked, and some must be left to learn from'
    )
  asked = set(unseen[:tests])
  learned = [kept[i] for i in order if i not in asked]
  return learned, [kept[i] for i in unseen[:tests]]
