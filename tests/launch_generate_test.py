"""nestax-generate: a run's model goes on from a prompt, or says why not."""

import re

import launch_cases as cases
import pytest

from nestax.launch import run, trained
from nestax.launch.evals import entrants


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('generate')
  config = cases.make_config(cases.write_corpus(folder / 'corpus'))
  run.train(run.prepare(config, folder / 'run'))
  return folder / 'run'


def test_the_newest_checkpoint_is_loaded(workdir):
  found = trained.load(workdir)
  assert found.step == 4
  same = entrants.tokenizer(str(workdir))
  assert same.pieces == found.tokenizer.pieces and same.adds_bos


WAYS = '--prompt_file=prompt.txt', '--prompt=chunk tok'
REFUSED = {
  '--workdir=/nowhere': 'no checkpoint in /nowhere',
  '--temperature=-1': 'temperature=-1.0',
  '--prompt_file=/nowhere.txt': '--prompt_file=/nowhere.txt: there is no',
  '--tokens=many': 'many',
  '--prompt=a|--prompt_file=/nowhere.txt': 'not both',
  'stray': "unexpected argument 'stray'",
}


@pytest.fixture(scope='module')
def told(workdir, tmp_path_factory):
  """What the command says to each line of words."""
  cwd = tmp_path_factory.mktemp('told')
  (cwd / 'prompt.txt').write_text('chunk tok')
  usual = f'--workdir={workdir}|--tokens=8|'
  ways = {way: usual + way for way in WAYS} | {line: line for line in REFUSED}
  lines = [line.split('|') for line in ways.values()]
  return dict(zip(ways, cases.forked('nestax.launch.generate', cwd, lines)))


def test_a_prompt_from_a_file_is_continued_the_same_way(told):
  (out, err, code), (by_word, *_) = (told[way] for way in WAYS)
  assert code == 0, err
  assert out.startswith('chunk tok')
  assert by_word == out
  assert re.fullmatch(
    r'nestax-generate: [\d,]+ parameters on 1 \S+, compiling\n', err
  )


@pytest.mark.parametrize('line', REFUSED)
def test_what_is_not_there_is_said_in_one_line(told, line):
  out, err, code = told[line]
  assert code == 2 and not out
  assert REFUSED[line] in err and err.count('\n') == 1
