"""What a config's file raises is told in words, and where it was."""

import pytest
from absl import flags
from ml_collections import config_flags

from nestax.launch import config_parsing

_FAILING = """
import json

def get_config():
  try:
    {begun}
  except {caught} as error:
    {raised}
"""


@pytest.mark.parametrize(
  'begun,raised,words',
  [
    (
      '{}[3]',
      'raise ValueError("no 3") from None',
      'line 8: ValueError: no 3$',
    ),
    (
      '{}[3]',
      'raise ValueError("no 3") from error',
      r'line 8: ValueError: no 3 \(because of mine.py, line 6: KeyError: 3\)$',
    ),
    (
      '{}[3]',
      'raise TypeError("no 3")',
      r'line 8: TypeError: no 3 \(because of mine.py, line 6: KeyError: 3\)$',
    ),
    (
      '{}[3]',
      'raise ValueError("no 3") from OSError("full")',
      r'line 8: ValueError: no 3 \(because of OSError: full\)$',
    ),
    ('int("x")', 'raise', 'line 6: ValueError: invalid literal'),
    # an exception that cannot be made of words alone
    (
      'json.loads("[")',
      'raise',
      'line 6, in decoder.py, line [0-9]+: JSONDecodeError: Expecting',
    ),
  ],
  ids=['none', 'cause', 'context', 'not raised', 'again', 'of more than words'],
)
def test_what_a_config_file_raises_is_told(begun, raised, words, tmp_path):
  caught = 'KeyError' if '3' in begun else 'ValueError'
  mine = tmp_path / 'mine.py'
  mine.write_text(_FAILING.format(begun=begun, caught=caught, raised=raised))
  with pytest.raises(config_parsing.FlagsError, match=f'^(mine.py, )?{words}'):
    parse(mine)


_LOCKED = """from nestax.launch.configs import tiny

def get_config():
  config = tiny.get_config()
  config.opt.lrr = 3
"""
_UNKNOWN = 'unknown key of the config: '
_TRIED = """from nestax.launch.configs import tiny

def get_config():
  config = tiny.get_config()
  try:
    {}
  except Exception as error:
    {}
"""
_HIDDEN = _TRIED.format(
  'config.nothing = 3', 'raise ValueError("no") from error'
)
_BECAUSE = rf'\(because of mine.py, line 6: {_UNKNOWN}'
_NO_FILE = _TRIED.format('open("nosuch")', 'config["nothing"] = 3')
_OF_FILE = r'\(because of mine.py, line 6: FileNotFoundError: .*nosuch.\)$'
_LACKING = """from nestax.launch.configs import common

def get_config():
  config = common.defaults()
  config.unlock()
  del config.train
  return config
"""


@pytest.mark.parametrize(
  'text,words',
  [
    ('def get_config(:', '^mine.py, line 1: SyntaxError: '),
    ('import nowhere', "mine.py, line 1: ModuleNotFoundError: .*'nowhere'"),
    ('raise RuntimeError("not here")', 'line 1: RuntimeError: not here'),
    ('get_config = None\ndel get_config', 'no function get_config'),
    ('def get_config():\n  return LEARNING', "line 2: NameError: .*'LEARNING'"),
    ('def get_config():\n  assert 1 > 2, "few"', 'line 2: AssertionError: few'),
    ('def get_config():\n  return {}[7]', 'line 2: KeyError: 7'),
    ('import math\n\nmath.nosuch', 'line 3: AttributeError: .*nosuch'),
    ('def get_config():\n  open("nosuch")', 'line 2: FileNotFoundError: '),
    (
      'import helper_of_mine\n',
      '^mine.py, line 1, in helper_of_mine.py, line 1: NameError: ',
    ),
    (_LOCKED, f"^mine.py, line 5: {_UNKNOWN}'lrr'; did you mean 'lr'[?]$"),
    (
      'from nestax.launch.configs import tiny\n\n'
      'def get_config():\n  return tiny.get_config().trian',
      f"^mine.py, line 4: {_UNKNOWN}'trian'; did you mean 'train'[?]$",
    ),
    (_HIDDEN, f"^mine.py, line 8: ValueError: no {_BECAUSE}'nothing'[)]$"),
    (_NO_FILE, f"^mine.py, line 8: {_UNKNOWN}'nothing' {_OF_FILE}"),
    (
      'import json\n\ndef get_config():\n  return {}["\'a\'"]',
      r'^mine.py, line 4: KeyError: ',
    ),
    ('def get_config():\n  return {"a": 1}', 'gives a dict, no ConfigDict'),
    (
      _LACKING,
      'no train.accumulate, train.batch, .* more, which stand',
    ),
  ],
)
def test_whatever_is_wrong_with_a_file_is_said(
  text, words, tmp_path, monkeypatch
):
  folder = tmp_path / 'importlib'  # a name is no reason to leave a file out
  folder.mkdir()
  mine = folder / 'mine.py'
  mine.write_text(text)
  (folder / 'helper_of_mine.py').write_text('wrong\n')
  monkeypatch.syspath_prepend(folder)
  with pytest.raises(config_parsing.FlagsError, match=words):
    parse(mine)


def test_an_error_of_nobody_s_file_is_raised_as_it_is(monkeypatch):
  monkeypatch.setattr(config_parsing, 'quiet', lambda: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    parse('tiny')


def parse(config):
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  config_parsing.parse_flags(['prog', f'--config={config}'], values)
