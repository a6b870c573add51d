"""Days and nights end to end; the slow one asks whether sleep works."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from nestax.launch import lock, rehearsal
from nestax.launch.evals import (
  cells,
  lives,
  nights,
  pupil,
  retention,
  sleepers,
)
from nestax.sleep.dream import DreamConfig
from nestax.sleep.objective import SeedConfig
from nestax.sleep.reader import Said
from nestax.sleep.tools import CycleConfig

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


def test_help_names_the_ways_as_methods_takes_them(monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['nights', '--help'])
  with pytest.raises(SystemExit) as stop:
    nights.cli()
  ways = capsys.readouterr().out.partition('for --methods:\n')[2].split('\n\n')
  names = [line.strip() for line in ways[0].splitlines()]
  assert stop.value.code == 0
  assert nights.methods(names) == list(sleepers.NAMES)
  assert nights.methods(','.join(names).split(',')) == list(sleepers.NAMES)


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


def flat(config):
  values = {}
  for name, value in dataclasses.asdict(config).items():
    if isinstance(value, dict):
      values |= {f'{name}.{key}': x for key, x in value.items()}
    else:
      values[name] = value
  return values


def test_a_variant_is_the_night_without_one_part(monkeypatch):
  lived = []
  monkeypatch.setattr(sleepers.tools_, 'of_model', lambda cfg, how, words: how)
  monkeypatch.setattr(
    sleepers.cycle,
    'night',
    lambda how, *args, tasks, past: (
      lived.append((flat(how), tasks, past))
      or types.SimpleNamespace(params=None, metrics={}, seconds={})
    ),
  )
  night = CycleConfig(SeedConfig(alpha=0.5), dream=DreamConfig(top=5, random=2))
  evening = sleepers.Evening(*[None] * 3, 'past', None, ('task',), 1, None)
  for name in sleepers.variants(night):
    sleepers.make(name, None, night, None, 0.1).night(evening)
  (whole, *_), *_ = lived
  assert all(past == 'past' for *_, past in lived)
  parts = {
    name: ({k: x for k, x in how.items() if x != whole[k]}, bool(tasks))
    for name, (how, tasks, _) in zip(sleepers.variants(night), lived)
  }
  assert parts == {
    'sleep': ({}, False),
    'sleep and dreams': ({}, True),
    'dreams, no selection': ({'dream.top': 0, 'dream.random': 7}, True),
    'no imitation': ({'seed.alpha': 1.0}, False),
    'imitation alone': ({'seed.alpha': 0.0}, False),
    'no own texts': ({'seed.alpha': 1.0, 'seed.on_policy': 0.0}, False),
    'reward ten times': ({'seed.alpha': 0.5 / 5.5}, False),
    'nothing kept': ({'seed.keep': 0.0}, False),
  }
  assert whole['gate.core'] > 1e6  # what is compared is never rolled back


def said(first, rows):
  tokens = np.arange(first, first + rows)[:, None].repeat(4, 1)
  return Said(tokens, np.ones(rows, int), np.full(rows, 4))


def test_a_night_keeps_all_days_alike_and_other_texts_every_time():
  how = lives.setting('', ['past=10', 'rehearsed=7'])
  world = types.SimpleNamespace(rehearsed=said(900, 50))
  days = [said(100, 20), said(200, 2), said(300, 20)]

  def kept(days, night=2, how=how):
    rows = lives._to_keep(world, how, days, 0, night)
    assert {len(part) for part in rows} == {len(rows.length_B)}
    return list(rows.tokens_BxL[:, 0])

  rows = kept(days)
  assert [sum(x // 100 == day for x in rows) for day in (1, 2, 3)] == [3, 3, 4]
  assert set(rows) >= {200, 201}  # all of a short day before any comes again
  assert len(rows) == 17 and len({x for x in rows if x >= 900}) == 7
  assert len(kept([])) == 7 and kept([]) != kept([], night=3)
  none = lives.setting('', ['past=0', 'rehearsed=0'])
  assert lives._to_keep(world, none, days, 0, 2) is None


@pytest.mark.parametrize(
  'given, words',
  [
    ({'model': 'x.gguf'}, '--core=TEXT.txt'),
    ({'model': 'x.gguf', 'core': 'a'}, 'rehearsed=512 .* give files'),
    ({'core': 'a'}, 'go with a --model'),
  ],
)
def test_texts_that_do_not_fit_the_model_are_refused(tmp_path, given, words):
  how = lives.setting(given.get('model', ''), [])
  with pytest.raises(ValueError, match=words):
    lives.world(how, tmp_path, **given)


def test_no_line_of_the_pupils_core_is_rehearsed(monkeypatch, tmp_path):
  monkeypatch.setattr(pupil, 'kept', lambda path: pupil.make(steps=0))
  made = lives.world(lives.Setting(), tmp_path)

  def lines(rows):
    text = '\n'.join(made.tokenizer.decode(row[1:]) for row in rows)
    found = [line for line in text.split('\n') if line[-1:] == '.']
    return set(found)

  core, rehearsed = map(lines, (made.core.tokens_BxL, made.rehearsed[0]))
  assert len(core) > 80 and len(rehearsed) > 1_000
  assert not core & rehearsed
  assert len({line.split()[0] for line in core}) > 20  # of many forms


def test_the_core_set_is_the_middle_of_a_text_and_the_rest_is_cut_whole(
  tmp_path,
):
  path = tmp_path / 'book.txt'
  path.write_text('abcdefghijk')
  letters = types.SimpleNamespace(encode=lambda text: list(text.encode()))

  def cut(*how):
    return [
      bytes(row.tolist()).decode() for row in rehearsal.cut(letters, *how)
    ]

  assert cut(path, 2) == ['ab', 'cd', 'ef', 'gh', 'ij']
  assert cut(path, 2, 3) == ['cd', 'ef', 'gh']
  with pytest.raises(ValueError, match='shorter than 6 times 2 tokens'):
    cut(path, 2, 6)


def test_processes_share_the_cells(tmp_path, monkeypatch, capsys):
  lived = []

  def live(world, setting, sleeper, seed, *rest):
    lived.append(seed)
    return [{'night': 0}]

  monkeypatch.setattr(lives, 'live', live)
  monkeypatch.setattr(sleepers, 'make', lambda *how: None)
  world = types.SimpleNamespace(name='m', texts={}, cfg=None, words=None)
  how = lives.setting('', [])
  (tmp_path / 'cells').mkdir()
  with lock.free(tmp_path / 'cells' / 'sleep-2-1.lock') as mine:
    assert mine  # another process lives seed 1
    nights.run(world, how, ['sleep'], [0, 1, 2], 2, tmp_path)
  assert lived == [0, 2]
  nights.run(world, how, ['sleep'], [0, 1, 2], 2, tmp_path)
  assert lived == [0, 2, 1]


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


@pytest.fixture
def in_full():
  """Compiles as users do: this computes for longer than it compiles."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)  # as conftest.py


@pytest.mark.slow
def test_five_nights_keep_of_days_what_a_reset_would_lose(tmp_path, in_full):
  assert command(tmp_path, 'sleep,no sleep,fine-tuning', days=5) == 0
  assert '| fine-tuning |' in (tmp_path / 'table.md').read_text()
  slept, unslept, tuned = (
    cells.read(tmp_path / 'cells' / f'{name}-5-0.json')
    for name in ('sleep', 'no-sleep', 'fine-tuning')
  )
  got, reset, tuned = map(retention.numbers, (slept, unslept, tuned))
  chance = slept[0]['chance']
  assert got['before'] > 4 * chance  # the levels have learned the days
  assert got['after'] > 0.4 * got['before'] > 1.5 * chance
  # of day 1, after night 5
  assert got['last'] > max(0.45 * got['first'], 1.8 * chance)
  assert reset['after'] < 1.7 * chance and reset['rise'] == 0
  assert got['rise'] < 0.6 and got['rise'] < 0.4 * tuned['rise']


def test_without_expansion_each_night_draws_by_keys_of_its_own(monkeypatch):
  keys = []

  def noted(key, *rest):
    keys.append(tuple(np.asarray(jax.random.key_data(key))))
    return rest

  def run(*args, keep):
    noted(args[6])
    return {}, {}

  for name in ('of_model', 'learned'):
    monkeypatch.setattr(sleepers.readers, name, lambda *args: None)
  monkeypatch.setattr(sleepers.seed, 'programs', lambda *args: None)
  monkeypatch.setattr(sleepers.seed, 'run', run)
  monkeypatch.setattr(sleepers.texts, 'drawer', lambda *args: None)
  monkeypatch.setattr(sleepers.texts, 'make', lambda *args: noted(args[4]))
  monkeypatch.setattr(sleepers.texts, 'kept', lambda *args: noted(args[3]))
  monkeypatch.setattr(sleepers, '_take', lambda *args: {})
  cfg = types.SimpleNamespace(stream=types.SimpleNamespace(periods=(4,)))
  words = types.SimpleNamespace(bos=0, eos=-1)
  made = sleepers.make('no expansion', cfg, CycleConfig(), words, 0.1)
  for number in (1, 2):
    key = jax.random.key(0)
    made.night(sleepers.Evening({'blocks': {}}, *[None] * 5, number, key))
  assert len(keys) == len(set(keys)) == 6
