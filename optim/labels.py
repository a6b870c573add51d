"""Labels for parameters: regular expressions over paths, each exactly once."""

import collections
import re
from collections.abc import Sequence
from typing import Any

import jax

Rule = tuple[str, str]  # (regular expression over the whole path, label)


class LabelError(ValueError):
  """The rules leave parameters out, or claim some of them twice."""


def path_of(keys: Sequence[Any]) -> str:
  """Joins a key path of JAX into `blocks/mixer/query/kernel`."""
  names = []
  for key in keys:
    if isinstance(key, jax.tree_util.GetAttrKey) and key.name == 'value':
      continue  # a box of logical axes around the array, not a name
    names.append(str(getattr(key, 'key', getattr(key, 'name', None) or key)))
  return '/'.join(name.strip('[].') for name in names)


def paths(params: Any) -> list[str]:
  """Lists the paths of all parameters, in the order of `jax.tree.leaves`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return [path_of(keys) for keys, _ in leaves]


def label(params: Any, rules: Sequence[Rule]) -> Any:
  """Labels every parameter by the one rule whose expression is its path.

  Args:
    params: a pytree; only its structure is read, so shapes will do.
    rules: pairs of a regular expression, which has to match the whole path
      (`re.fullmatch`), and a label.

  Returns:
    A pytree of the same structure with strings for leaves, as
    `optax.multi_transform` takes it.

  Raises:
    LabelError: listing the paths that no rule matches and those that two or
      more rules match, with these rules; or for an expression that is none.
  """
  compiled = [(_compiled(pattern, name), name) for pattern, name in rules]
  hits = {
    path: [
      (rule.pattern, name) for rule, name in compiled if rule.fullmatch(path)
    ]
    for path in paths(params)
  }
  _check(hits)
  return jax.tree_util.tree_map_with_path(
    lambda keys, _: hits[path_of(keys)][0][1], params
  )


def describe(params: Any, rules: Sequence[Rule]) -> str:
  """Writes one line per label: how many arrays and numbers it covers."""
  arrays, numbers = collections.Counter(), collections.Counter()
  labels = jax.tree.leaves(label(params, rules))
  for name, leaf in zip(labels, jax.tree.leaves(params)):
    arrays[name] += 1
    numbers[name] += leaf.size
  return '\n'.join(
    f'{name}: {arrays[name]} arrays, {numbers[name]:,} numbers'
    for name in sorted(arrays)
  )


def _compiled(pattern, name):
  try:
    return re.compile(pattern)
  except re.error as error:
    raise LabelError(
      f'the rule {pattern!r} -> {name} is no regular expression: {error}'
    ) from error


def _check(hits: dict[str, list[Rule]]) -> None:
  left_out = [path for path, found in hits.items() if not found]
  twice = {path: found for path, found in hits.items() if len(found) > 1}
  problems = []
  if left_out:
    problems.append('no rule matches: ' + ', '.join(left_out))
  for path, found in twice.items():
    rules = ' and '.join(f'{pattern!r} -> {name}' for pattern, name in found)
    problems.append(f'{path} is matched by {rules}')
  if problems:
    raise LabelError(
      'every parameter needs exactly one rule; ' + '; '.join(problems)
    )
