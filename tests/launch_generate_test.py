"""nestax-generate: a run's model goes on from a prompt, or says why not."""

import launch_cases as cases
import pytest

from nestax.launch import run, trained


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('generate')
  config = cases.make_config(cases.write_corpus(folder / 'corpus'))
  run.train(run.prepare(config, folder / 'run'))
  return folder / 'run'


def test_a_prompt_from_a_file_is_continued_the_same_way(workdir, tmp_path):
  prompt = tmp_path / 'prompt.txt'
  prompt.write_text('chunk tok')
  usual = [f'--workdir={workdir}', '--tokens=8']
  ways = f'--prompt_file={prompt}', '--prompt=chunk tok'
  by_file, by_word = cases.forked(
    'nestax.launch.generate', tmp_path, [[*usual, way] for way in ways]
  )
  out, err, code = by_file
  assert code == 0, err
  assert out.startswith('chunk tok')
  assert by_word[0] == out


def test_the_newest_checkpoint_is_loaded(workdir):
  assert trained.load(workdir).step == 4


REFUSED = {
  '--workdir=/nowhere': 'no checkpoint in /nowhere',
  '--temperature=-1': 'temperature=-1.0',
  '--prompt_file=/nowhere.txt': '/nowhere.txt',
  '--tokens=many': 'many',
  '--prompt=a|--prompt_file=/nowhere.txt': 'not both',
  'stray': "unexpected argument 'stray'",
}


@pytest.fixture(scope='module')
def refusals(tmp_path_factory):
  cwd = tmp_path_factory.mktemp('refused')
  lines = [words.split('|') for words in REFUSED]
  return dict(zip(REFUSED, cases.forked('nestax.launch.generate', cwd, lines)))


@pytest.mark.parametrize('line', REFUSED)
def test_what_is_not_there_is_said_in_one_line(refusals, line):
  out, err, code = refusals[line]
  assert code == 2 and not out
  assert REFUSED[line] in err and err.count('\n') == 1
