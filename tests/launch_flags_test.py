"""Flags are said in phrases that stand alone, each in a line."""

import importlib
import re

import pytest

COMMANDS = (
  *('train', 'sleep', 'generate', 'compile'),
  *(
    f'benches.{name}' for name in ('optim', 'kernel', 'step', 'decode', 'fits')
  ),
  *(f'evals.{name}' for name in ('suites', 'novel_command', 'babilong')),
  *(f'evals.{name}' for name in ('levels', 'optimizers', 'widths', 'nights')),
)
ABSL = 'flagfile', 'undefok'


@pytest.mark.parametrize('name', COMMANDS)
def test_a_flag_says_in_a_phrase_what_it_is(name):
  values = importlib.import_module(f'nestax.launch.{name}').FLAGS
  for flag in set(values) - set(ABSL):
    words = values[flag].help.split(';\n')[0]  # absl adds a line to some
    assert re.fullmatch(r'[^\n]{20,160}', words), (flag, words)
    # what goes on from the flag's name, which is not a phrase
    assert not re.match(r'(Of|Or|For|To|That|\d+:) ', words), (flag, words)
    assert len(words.split()) > 3, (flag, words)
