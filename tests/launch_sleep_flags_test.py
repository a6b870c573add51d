"""A command line is the life that it says, and what was measured without."""

import dataclasses

import nights_cases as cases
import pytest

from nestax.launch import sleep_flags, sleep_options
from nestax.launch.evals import lives


@pytest.mark.parametrize('model', ['x.gguf', ''])
def test_pretrained_models_sleep_as_was_measured(model, tmp_path, monkeypatch):
  folder = cases.write_texts(tmp_path)
  asked = []
  monkeypatch.setattr(
    sleep_flags.novel, 'load', lambda *x: asked.append(x) or cases.made(slots=0)
  )
  values = {
    'model': model, 'workdir': '' if model else 'run', 'stack': None,
    'periods': ['4', '8'] if model else None, 'rate': None,
    'scope': 'shared', 'slots': 2,
    'text': [str(folder / 'ann.txt')], 'core': str(folder / 'core.txt'),
    'days': 0, 'nights': 3, 'sleep_every': 0, 'owners': [],
    'rehearse': [], 'questions': '',
    'set': ['rank=4', 'night.seed.rows=2'],
  }  # fmt: skip
  options = sleep_flags.plan(values).options
  assert (options.nights, options.rank, options.night.seed.rows) == (3, 4, 2)
  stack = ('groups', ('4', '8'), 'all', 0.2)
  assert asked[0][-1] == (stack if model else ('', (), 'all', 0.0))
  night = sleep_options.LARGE if model else sleep_options.SMALL
  seed = dataclasses.replace(night.seed, rows=2)
  assert options.night == dataclasses.replace(night, seed=seed)
  measured = lives.PRETRAINED
  assert measured.rank == sleep_options.PRETRAINED.rank
  assert measured.window == sleep_options.PRETRAINED.window
  assert [*map(str, measured.periods)] == [*sleep_flags.STACK['periods']]
  assert measured.rate == sleep_flags.STACK['rate']
  assert (options.window, options.readings) == ((64, 4) if model else (2048, 1))
  # a night in the middle of a day can only be of what was read once
  often = sleep_flags.plan(values | {'sleep_every': 9}).options
  assert (often.readings, often.sleep_every) == (1, 9)
  dream = measured.how.dream
  assert dataclasses.replace(sleep_options.LARGE, dream=dream) == measured.how


def test_a_model_without_slots_is_told_how_many_a_night_uses_up(monkeypatch):
  monkeypatch.setattr(sleep_flags.novel, 'load', lambda *_: cases.made(slots=0))
  values = {
    'model': '', 'workdir': 'run', 'stack': None, 'periods': None,
    'rate': None, 'scope': 'shared', 'slots': 0, 'nights': 3,
    'sleep_every': 0, 'set': [], 'text': ['a.txt'], 'core': 'c.txt',
  }  # fmt: skip
  words = 'night uses up two of the slowest level .one of an only level.'
  with pytest.raises(ValueError, match=words):
    sleep_flags.plan(values)
