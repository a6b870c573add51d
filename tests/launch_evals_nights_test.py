"""Days and nights end to end; the slow one asks whether sleep works."""

import json

import numpy as np
import pytest

from nestax.launch.evals import cells, lives, nights, retention, sleepers

BRIEF = (
  'people=3 passes=2 past=4 core=4 seed.steps=2 seed.rows=2 seed.every=2 '
  'seed.group=2 texts.read=8 texts.kept=4 dream.dreams=4 dream.top=1 '
  'dream.random=1 tasks=1 asked=2'
).split()


def command(folder, methods, sets=(), days=2, seeds='0'):
  argv = ['nights', f'--workdir={folder}', f'--days={days}', f'--seeds={seeds}']
  argv += [f'--methods={methods}', *(f'--set={change}' for change in sets)]
  nights.FLAGS.unparse_flags()
  nights.FLAGS['set'].unparse()
  return nights.main(nights.FLAGS(argv))


def test_settings_are_changed_by_name_or_refused():
  made = lives.setting('', ['passes=3', 'seed.rate=0.5', 'periods=16+64'])
  assert made.passes == 3 and made.how.seed.rate == 0.5
  assert made.periods == (16, 64)
  assert lives.setting('x.gguf', []).dtype == 'bfloat16'
  with pytest.raises(ValueError, match='--set=seed.nap=1: no such setting'):
    lives.setting('', ['seed.nap=1'])


def test_names_of_methods_are_read_with_their_commas():
  assert nights.methods(['fine-tuning; replay']) == ['fine-tuning, replay']
  assert nights.methods(['all']) == list(sleepers.NAMES)
  with pytest.raises(ValueError, match="'nap': one of sleep"):
    nights.methods(['nap'])


@pytest.mark.slow
def test_every_method_lives_and_goes_on_where_it_was(tmp_path, capsys):
  assert command(tmp_path, 'all', BRIEF) == 0
  found = sorted((tmp_path / 'cells').glob('*.json'))
  assert len(found) == len(sleepers.NAMES)
  for path in found:
    key, first, *rows = map(json.loads, path.read_text().splitlines())
    assert key['setting']['people'] == 3 and len(rows) == 2
    assert len(first['after']) == 2 and len(rows[1]['after']) == 2
    assert np.isfinite([row['core'] for row in rows]).all()
  unslept = cells.read(tmp_path / 'cells' / 'no-sleep-2-0.json')
  assert unslept[2]['core'] == unslept[0]['core']
  times = [path.stat().st_mtime_ns for path in found]
  capsys.readouterr()
  assert command(tmp_path, 'all', BRIEF) == 0
  assert [path.stat().st_mtime_ns for path in found] == times
  assert '| fine-tuning, replay |' in capsys.readouterr().out
  assert command(tmp_path, 'sleep', ['passes=3', *BRIEF[:1]]) == 2


@pytest.mark.slow
def test_a_night_keeps_of_a_day_what_a_reset_would_lose(tmp_path):
  methods = 'no own texts,no sleep'
  assert command(tmp_path, methods) == 0
  slept, unslept = (
    cells.read(tmp_path / 'cells' / f'{name}-2-0.json')
    for name in ('no-own-texts', 'no-sleep')
  )
  got = retention.numbers(slept)
  chance = slept[0]['chance']
  assert got['before'] > 4 * chance  # the levels have learned the day
  assert got['after'] > 0.4 * got['before'] > 1.5 * chance
  assert retention.numbers(unslept)['after'] < 1.7 * chance
  assert got['rise'] < 0.4
