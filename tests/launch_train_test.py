"""The command line: what runs, what is refused, in words and exit codes."""

import importlib
import os
import re
import subprocess
import sys
import types

import launch_cases as cases
import pytest

from nestax.launch import checkpoint, distributed, lock, run, train

COMMAND = [sys.executable, '-m', 'nestax.launch.train']
# What is refused, and the words it is refused with.
REFUSED = {
  '--config.train.stepz=3': "config: 'stepz'; did you mean 'steps'[?]",
  '--config.nothing.at=3': "unknown key of the config: 'nothing'",
  '--config.train.steps=many': 'config.train.steps=many: a whole number is',
  '--config.opt.lr=fast': 'config.opt.lr=fast: a number is wanted',
  '--config.data.shuffle=maybe': 'data.shuffle=maybe: True or False is wanted',
  '--config.train.steps=0': 'train.steps is 0: it has to be at least 1',
  '--config.opt.clip=nan': 'opt.clip is nan: it has to be 0 or above',
  '--config.seed=-1': 'seed is -1: it has to be 0',
  '--config=nonsense': 'no config file .nonsense.* quickstart.* tiny',
  '--config=gated_deltanet:341m': '--config=gated_deltanet:341m: no such size',
  '--config=tiny:30m': '--config=tiny:30m: tiny has one size: leave out :30m',
  '--config=mine.py:30m': r'mine.py:30m: get_config\(\) takes 0 positional',
  '--config=mine.py': r'mine.py, line 2: TypeError: .* 0 positional',
  '--bogus': "Unknown command line flag 'bogus'",
  '--steps=10': r"flag 'steps'; .* set by (\S+, )*--config\.train\.steps\b",
  '--config.steps=10': r"'steps'; .* set by (\S+, )*--config\.train\.steps\b",
  '--model.cms.remat=x': r'cms.remat.; .* by --config\.model\.cms\.remat$',
  'bogus': "unexpected argument 'bogus'",
  '--workdir=/proc/run': 'cannot write in the workdir /proc/run',
  '--distributed': 'no cluster in the environment .* Give --coordinator',
}


def start(*arguments, cwd, **environment):
  return subprocess.Popen(
    [*COMMAND, *arguments],
    cwd=cwd,
    env=os.environ | cases.QUICK | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.fixture(scope='module')
def refusals(tmp_path_factory):
  cwd = tmp_path_factory.mktemp('refused')
  (cwd / 'mine.py').write_text('def get_config():\n  return get_config(1)\n')
  words = [*REFUSED, '--help']
  lines = [[word] for word in words]
  return dict(zip(words, cases.forked('nestax.launch.train', cwd, lines)))


@pytest.mark.parametrize('word', REFUSED)
def test_what_is_wrong_is_refused_in_one_line(refusals, word):
  out, err, code = refusals[word]
  assert code == 2 and not out
  assert re.fullmatch(f'nestax-train: .*{REFUSED[word]}.*\n', err), err


def test_help_says_what_can_be_given_and_where_the_keys_stand(refusals):
  out, err, code = refusals['--help']
  assert code == 0 and not err
  assert out.startswith('Trains a model: ')
  flags = 'config', 'workdir', '[no]distributed', 'coordinator', 'heartbeat'
  assert all(f'  --{flag}: ' in out for flag in flags)
  assert not re.search('absl|pdb|profile_file|flagfile|helpfull', out)
  for name in (
    'quickstart',
    'novels',
    'hope_1_3b',
    'retnet',
    'configs/common.py',
  ):
    assert name in out
  assert 'models/config.py' in out and '1_3b' in out
  # its own and those of a job, under one heading
  assert len(re.findall(r'^\S*train(?:\.py)?:$', out, re.M)) == 1
  assert 'distributed:' not in out.split()


def test_the_workdir_of_another_config_is_refused(monkeypatch, capsys):
  """As every command refuses what it is asked: 2, where a failure is 1."""

  def other(plan):
    raise checkpoint.OtherConfigError('another config: train.batch is 2 there')

  def damaged(plan):
    raise checkpoint.CheckpointError('none of the checkpoints can be read')

  monkeypatch.setattr(run, 'prepare', lambda *_: None)
  monkeypatch.setattr(distributed, 'join', lambda job: None)
  monkeypatch.setattr(train, '_CONFIG', types.SimpleNamespace(value=None))
  for fails, code, words in (
    (other, 2, 'another config'),
    (damaged, 1, 'none of'),
  ):
    monkeypatch.setattr(run, 'train', fails)
    assert train._train(None, 'there') == code
    assert words in capsys.readouterr().err


def test_a_config_file_trains_and_its_keys_can_be_set(tmp_path):
  corpus = cases.write_corpus(tmp_path / 'corpus')
  config = tmp_path / 'mine.py'
  config.write_text(
    'import launch_cases\n\n\n'
    'def get_config():\n'
    f'  return launch_cases.make_config({corpus!r})\n'
  )
  process = start(
    f'--config={config}',
    '--config.train.steps=2',
    '--config.log.sample_tokens=2',
    cwd=tmp_path,
    PYTHONPATH=cases.path(),
  )
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert not err
  assert 'step 2/2  loss ' in out and 'bits/byte' in out
  assert 'bigram entropy of the same bytes' in out
  assert {p.name for p in (tmp_path / 'runs' / 'small').iterdir()} == {
    '.lock',
    'checkpoints',
    'loss.png',
    'metrics.jsonl',
    'sample.txt',
    'tensorboard',
  }


@pytest.fixture
def command(tmp_path, monkeypatch):
  """`nestax-train` in this process: from a config to its exit code."""

  def run_command(config):
    monkeypatch.setattr(train, '_CONFIG', types.SimpleNamespace(value=config))
    where = types.SimpleNamespace(value=str(tmp_path / 'run'))
    monkeypatch.setattr(train, '_WORKDIR', where)
    monkeypatch.setattr(train, '_JOB', distributed.Job)
    return train.main(['nestax-train'])

  return run_command


def test_a_second_run_in_a_workdir_is_refused(command, tmp_path, capfd):
  config = cases.make_config(cases.write_corpus(tmp_path / 'corpus'))
  (tmp_path / 'run').mkdir()
  with lock.held(tmp_path / 'run'):
    assert command(config) == 2
  words = f'another run is going on in the workdir {tmp_path / "run"}'
  assert words in capfd.readouterr().err
  assert [p.name for p in (tmp_path / 'run').iterdir()] == ['.lock']


def test_a_killed_run_lets_go_of_its_workdir(tmp_path):
  code = (
    'import sys, time\nfrom nestax.launch import lock\n'
    'with lock.held(sys.argv[1]):\n  print(1, flush=True)\n  time.sleep(99)'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code, tmp_path], stdout=subprocess.PIPE
  ) as process:
    process.stdout.readline()
    with pytest.raises(lock.InUse), lock.held(tmp_path):
      pass
    process.kill()
  with lock.held(tmp_path):
    pass


@pytest.mark.parametrize(
  'name,content,words',
  [
    ('bad.txt', b'a' * 400 + b'\xe9' + b'b' * 400, 'bad.txt is not UTF-8'),
    ('bad.jsonl', b'{"text": "aaaa"}\nnot json\n' * 9, 'is not JSON'),
  ],
)
def test_bad_text_is_said_in_words(
  command, tmp_path, capfd, name, content, words
):
  (tmp_path / 'corpus').mkdir()
  for i in range(6):
    (tmp_path / 'corpus' / f'{i}{name}').write_bytes(content)
  config = cases.make_config(str(tmp_path / 'corpus' / f'*{name}'))
  config.data.source = 'jsonl' if name.endswith('jsonl') else 'text'
  assert command(config) in (1, 2)
  err = capfd.readouterr().err
  assert words in err and 'Traceback' not in err


@pytest.mark.parametrize('name', ['quickstart', 'tiny'])
def test_the_configs_that_come_along_pass_their_own_checks(name, tmp_path):
  module = importlib.import_module(f'nestax.launch.configs.{name}')
  config = module.get_config()
  config.mesh.data = 1
  plan = run.prepare(config, tmp_path / name)
  assert config.name == name and plan.model.cfg.family == 'hope'
