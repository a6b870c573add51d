"""BUILD_NOTES.md names, for every equation, a function that exists."""

import importlib
import pathlib
import re

import pytest

NOTES = pathlib.Path(__file__).parents[1] / 'BUILD_NOTES.md'
ROW = re.compile(
  r'^\| (NL [^|]+|Titans[^|]+|Sleep[^|]+) \| `(nestax[\w.]+)` \|'
)


def rows():
  lines = NOTES.read_text(encoding='utf-8').splitlines()
  return [m.groups() for m in map(ROW.match, lines) if m]


@pytest.mark.parametrize('equation,name', rows())
def test_the_function_exists(equation, name):
  module, attribute = name.rsplit('.', 1)
  assert hasattr(importlib.import_module(module), attribute), equation


def test_the_equations_of_the_model_are_all_there():
  named = set()
  for equation, _ in rows():
    for first, last in re.findall(r'(\d+)(?:-(\d+))?', equation):
      named |= set(range(int(first), int(last or first) + 1))
  wanted = {70, 71, 73, 75, *range(83, 98)}
  assert wanted <= named, wanted - named
