"""nestax-bench: finds its benchmark, or says in one line why not."""

import pytest

from nestax.launch import bench


def test_optim_prints_a_table(capsys):
  words = ['optim', '--shapes=2x4x8', '--repeats=1', '--every=2']
  assert bench.main(['nestax-bench', *words]) == 0
  printed = capsys.readouterr().out
  assert '64 numbers in 1 arrays' in printed
  assert all(name in printed for name in ('adamw', 'optax muon', 'm3'))


def test_help_names_the_flags(capsys):
  assert bench.main(['nestax-bench', 'optim', '--help']) == 0
  assert '--shapes' in capsys.readouterr().out


def test_a_file_may_be_called_h(monkeypatch, capsys):
  monkeypatch.setattr('nestax.launch.benches.optim.main', lambda: None)
  assert bench.main(['nestax-bench', 'optim', '--json', '-h']) == 0
  assert not capsys.readouterr().out


@pytest.mark.parametrize('words', [['--nohelp', 'optim'], ['optim', '-nohelp']])
def test_no_help_may_be_asked_for(words, monkeypatch, capsys):
  ran = []
  monkeypatch.setattr('nestax.launch.benches.optim.main', lambda: ran.append(1))
  assert bench.main(['nestax-bench', *words]) == 0
  assert ran and not capsys.readouterr().out


@pytest.mark.parametrize('word', ['--help', '-h', '-help', '--help=true'])
def test_help_says_what_each_benchmark_is(word, capsys):
  assert bench.main(['nestax-bench', word]) == 0
  result = capsys.readouterr()
  assert not result.err
  lines = {x.split()[0]: x for x in result.out.splitlines() if x[:2] == '  '}
  assert tuple(lines) == bench.NAMES
  assert 'Times the memory beside attention' in lines['kernel']
  assert '--length=4096' in lines['kernel']


@pytest.mark.parametrize(
  'words,said',
  [
    ([], "'' is no benchmark: give one of optim"),
    (['speed'], "'speed' is no benchmark"),
    (['optim', '--repeats=0'], 'repeats'),
    (['optim', '--preset=huge'], 'huge'),
    (['optim', '--shapes=4x'], "'4x' is no shape"),
    (['step', '--levels=half'], '--levels=half: one of'),
    (['step', '--config=huge'], "no config file 'huge'"),
    (['step', '--config=tiny:30m'], 'tiny has one size'),
    (['step', '--peer=tiny', '--config=quickstart'], '--peer=tiny'),
    (['kernel', '--implementations=fast'], '--implementations=fast: of'),
    (['kernel', '--length=0'], '--length=0'),
    (['kernel', '--tpu-topology=v9:2x2'], 'v9:2x2'),
    (['decode', '--set=model.E=3'], "no key 'model.E'"),
    (['optim', 'stray'], "unexpected argument 'stray'"),
  ],
)
def test_what_cannot_be_is_said_in_words(words, said, capsys):
  assert bench.main(['nestax-bench', *words]) == 2
  result = capsys.readouterr()
  assert said in result.err and not result.out
