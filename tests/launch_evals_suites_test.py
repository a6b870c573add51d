"""The command: what it refuses, what it does, and the stream as before."""

import json

import pytest

from nestax.launch import evaluate
from nestax.launch.evals import formal, novel_command, suites


@pytest.fixture(autouse=True)
def fresh():
  """Flags that nobody has parsed yet, as in a process of its own."""
  yield
  forget()


def forget():
  for module in (suites, novel_command):
    module.FLAGS.unparse_flags()
    for name in module.FLAGS:
      module.FLAGS[name].unparse()


def run(*words):
  return evaluate.main(evaluate._parse(['nestax-evaluate', *words]))


TRAIN = '--set=incremental.train=/no/file'  # not reached


@pytest.mark.parametrize(
  'words,said',
  [
    (
      ['--suite=formel'],
      '--suite=formel: of formal, mad, mqar, needle, arc, babilong, ',
    ),
    (['--suite=mad', '--models=hop'], 'give families, of'),
    (
      ['--suite=needle', '--models=runs/mine'],
      '--models=runs/mine: no such run or file; or give a family, of hope, ',
    ),
    (
      ['--suite=needle', '--models=.:levels=off'],
      '--models=.:levels=off: needle asks a trained model as it is: leave out',
    ),
    ([], 'give --text=FILE, or --suite=NAME'),
    (['--levels=off'], 'give --text=FILE, or --suite=NAME'),
    (['--suite=mad', '--set=formal.longest=9'], 'begin with the evaluation'),
    (['--suite=mad', '--set=mad.shrink=9'], 'shrink=9: 1 to 8'),
    (['--suite=mad', '--set=mad.train.D=0'], 'D=0: at least 1'),
    (['--suite=mad', '--rates=a'], '--rates=a: numbers'),
    (['--suite=mad', '--tasks=recall'], 'the tasks are compression, in-'),
    (['--suite=mad', 'more'], "unexpected argument 'more'"),
    (
      ['--suite=needle', '--set=needle.haystack=/no/book'],
      '--set=needle.haystack=/no/book: there is no such file',
    ),
    (
      ['--suite=incremental', '--models=m.gguf:stack=group', TRAIN],
      '--models=m.gguf:stack=group: stack is one of groups, copies',
    ),
    (
      ['--suite=incremental', '--models=m.gguf:stack=copies;periods=x', TRAIN],
      'stack=copies;periods=x: periods=x: whole numbers such as 128+512',
    ),
    (['--text=/no/book', '--levels=of'], '--levels=of: on, off or reset'),
  ],
)
def test_what_is_wrong_is_said_in_words(words, said, tmp_path, capsys):
  if any('--suite' in word for word in words):
    words = [*words, f'--workdir={tmp_path}']
  assert run(*words) == 2
  assert said in capsys.readouterr().err


PAIR = '{"input": [[0]], "output": [[1]]}'
CLASSES = '[["a", "x"], ["b", "y"]]'
FILES = {
  'arc': ('tasks', f'{{"train": [{PAIR}], "test": [{PAIR}]}}', []),
  'incremental': (
    'train',
    f'{{"train": {CLASSES}, "test": {CLASSES}}}',
    ['--set=incremental.stages=2'],
  ),
}


@pytest.mark.parametrize('name', FILES)
def test_a_model_that_is_not_there_is_said_before_anything_runs(
  name, tmp_path, capsys
):
  key, text, words = FILES[name]
  file = tmp_path / 'a.json'
  file.write_text(text)
  words = [f'--suite={name}', f'--set={name}.{key}={file}', *words]
  assert run(*words, f'--workdir={tmp_path}', '--models=nope.gguf') == 2
  said = 'nestax-evaluate: --models=nope.gguf: neither a folder of a run nor'
  assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
  'words,said',
  [(['--sweet=mad'], "'sweet'"), (['--suite=mad', '--seed=1'], "'seed'")],
)
def test_flags_are_those_of_what_is_run(words, said, capsys):
  with pytest.raises(SystemExit) as stop:
    run(*words)
  assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize('word', ['--help', '-help', '--help=true'])
def test_help_shows_both(word, capsys):
  with pytest.raises(SystemExit):
    run(word)
  said = capsys.readouterr().out
  assert '--suite' in said and '--window' in said


def test_a_suite_is_trained_and_then_only_read(tmp_path, monkeypatch, capsys):
  words = [
    '--suite=formal',
    f'--workdir={tmp_path}',
    '--models=transformer',
    '--tasks=parity',
    '--seeds=2',
    '--steps=4',
    '--rates=0.01',
    '--set=formal.longest=6',
    '--set=formal.beyond=10',
    '--set=formal.train.D=16',
    '--set=formal.train.N=1',
    '--set=formal.train.examples=20',
    '--set=formal.train.tests=8',
    '--set=formal.train.batch=4',
  ]
  assert run(*words) == 0
  table = (tmp_path / 'table.md').read_text()
  assert table in capsys.readouterr().out
  assert '| model | parity bin 0 | parity bin 1 | average |' in table
  assert '| DeltaNet (NL, Table 5) | 98.2 | 10.1 | - | - |' in table
  (line,) = map(json.loads, (tmp_path / 'results.jsonl').open())
  assert line['task'] == 'parity' and line['seeds'] == [0, 1]
  assert len(line['scores']['bin 1']['values']) == 2
  assert (tmp_path / 'formal.png').stat().st_size > 1000
  forget()
  monkeypatch.setattr(formal.trials, 'train', None)  # nothing is left to train
  assert run(*words) == 0
  assert (tmp_path / 'table.md').read_text() == table
  forget()
  assert run(*words, '--steps=8') == 2
  said = capsys.readouterr().err
  assert 'other settings: training.steps is 4 there and 8 here. Give' in said
