"""Classes that come in stages: the user's files, and what is measured."""

import csv
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
  """A text and the name of its class."""

  text: str
  label: str


class Stage(NamedTuple):
  """Classes that come together, and what there is of them."""

  labels: tuple[str, ...]
  train: tuple[Example, ...]
  test: tuple[Example, ...]


def read(path, part: str, text: str, label: str) -> list[Example]:
  """Reads examples.

  Args:
    path: .json as CLINC has it, `{"train": [[text, class], ...], ...}`; .csv or
      .tsv with a line of names first; .jsonl with an object a line.
    part: 'train' or 'test', of a .json.
    text, label: names of the columns, or keys of the objects.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: in words, for another kind of file or one that lacks them.
  """
  path = os.path.expanduser(os.fspath(path))
  kind = pathlib.Path(path).suffix
  if kind not in ('.json', '.jsonl', '.csv', '.tsv'):
    raise ValueError(f'{path}: .json, .jsonl, .csv or .tsv is wanted')
  with open(path, encoding='utf-8', newline='') as file:
    try:
      if kind == '.json':
        pairs = json.load(file)[part]
      elif kind == '.jsonl':
        rows = [json.loads(line) for line in file if line.strip()]
        pairs = [(row[text], row[label]) for row in rows]
      else:
        split = '\t' if kind == '.tsv' else ','
        rows = csv.DictReader(file, delimiter=split)
        pairs = [(row[text], row[label]) for row in rows]
      found = [Example(' '.join(t.split()), str(c).strip()) for t, c in pairs]
    except json.JSONDecodeError as error:
      raise ValueError(f'{path}: not JSON ({error})') from None
    except KeyError as error:
      raise ValueError(f'{path}: there is no {error} in it') from None
    except (AttributeError, TypeError, ValueError):
      raise ValueError(f'{path}: not pairs of a text and a class') from None
  if not found:
    raise ValueError(f'{path}: no examples')
  return found


def groups(path) -> list[tuple[str, ...]]:
  """Reads which classes belong together: `{"banking": ["balance", ...]}`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is another kind of file.
  """
  text = pathlib.Path(os.path.expanduser(path)).read_text(encoding='utf-8')
  try:
    return [tuple(map(str, names)) for names in json.loads(text).values()]
  except (ValueError, AttributeError, TypeError):
    raise ValueError(
      f'{path}: not a JSON object of lists of class names'
    ) from None


def deal(labels: Sequence[str], count: int, rng) -> list[tuple[str, ...]]:
  """Deals classes out to `count` stages, as equally as can be."""
  labels = sorted(set(labels))
  if not 1 <= count <= len(labels):
    raise ValueError(f'stages={count}: from 1 to the {len(labels)} classes')
  order = rng.permutation(len(labels))
  return [
    tuple(labels[i] for i in part) for part in np.array_split(order, count)
  ]


def stages(
  train: Sequence[Example],
  test: Sequence[Example],
  together: Sequence[Sequence[str]],
  rng,
  most_train: int = 0,
  most_test: int = 0,
) -> list[Stage]:
  """Makes the stages, in a random order.

  Args:
    train, test: examples.
    together: which classes come together.
    rng: of the order and of the examples that are taken.
    most_train, most_test: examples a class; 0 for all.

  Raises:
    ValueError: for a class without examples, or examples of no stage's class.
  """
  known = {label for names in together for label in names}
  lost = sorted({example.label for example in train} - known)
  if lost:
    raise ValueError(f'class {lost[0]!r} belongs to no stage')
  pools = {'train': _by_label(train), 'test': _by_label(test)}
  most = {'train': most_train, 'test': most_test}

  def take(part, names):
    found = []
    for name in names:
      pool = pools[part].get(name)
      if not pool:
        raise ValueError(f'class {name!r} has no example in the {part} part')
      order = rng.permutation(len(pool))[: most[part] or None]
      found += [pool[i] for i in order]
    return tuple(found[i] for i in rng.permutation(len(found)))

  order = rng.permutation(len(together))
  return [
    Stage(tuple(names), take('train', names), take('test', names))
    for names in (together[i] for i in order)
  ]


def _by_label(examples: Sequence[Example]) -> Mapping[str, list[Example]]:
  found: dict[str, list[Example]] = {}
  for example in examples:
    found.setdefault(example.label, []).append(example)
  return found


def measures(right: Sequence[Sequence[float]], tests: Sequence[int]) -> dict:
  """What class-incremental learning is judged by, in percent.

  Args:
    right: row t is after stage t: the shares of right answers, 0 to 1, on the
      tests of stages 0 to t, all classes so far to choose from.
    tests: how many tests a stage has.

  Returns:
    `final`, the accuracy on all tests at the end; `average`, of the
    accuracies on all tests so far, over stages; `forgetting`, by how much
    earlier stages are below their best, and `backward`, how their accuracy
    changed since they were learned, both means over all stages but the last
    (Chaudhry et al. 2018; Lopez-Paz and Ranzato 2017); and `stages`, the
    accuracy on all tests so far after each stage.
  """
  T = len(right)
  so_far = [float(np.average(row, weights=tests[: len(row)])) for row in right]
  best = [max(right[t][j] for t in range(j, T)) for j in range(T)]
  end = right[-1]
  made = {
    'final': so_far[-1],
    'average': float(np.mean(so_far)),
    'forgetting': 0.0,
    'backward': 0.0,
  }
  if T > 1:
    made['forgetting'] = float(
      np.mean([best[j] - end[j] for j in range(T - 1)])
    )
    made['backward'] = float(
      np.mean([end[j] - right[j][j] for j in range(T - 1)])
    )
  made = {name: 100 * value for name, value in made.items()}
  return made | {'stages': [100 * x for x in so_far]}
