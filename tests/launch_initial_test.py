"""Training from a pretrained file: whose model, which parameters, refusals."""

import shutil

import jax
import launch_cases
import llama_cases
import numpy as np
import pytest

from nestax.launch import initial, run, trained
from nestax.optim import labels


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('llama')
  llama_cases.write_safetensors(folder, llama_cases.weights())
  llama_cases.write_tokenizer(folder / 'tokenizer.json')
  return folder


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  texts = tmp_path_factory.mktemp('corpus')
  rng = np.random.default_rng(0)
  for i in range(40):
    letters = rng.choice(list('abcdefg'), 60)
    (texts / f'{i:02d}.txt').write_text(''.join(letters))
  return str(texts / '*.txt')


def make_config(corpus, folder, stack=''):
  config = launch_cases.make_config(corpus)
  usual = launch_cases.common.defaults().model
  config.model = usual
  config.model.dtype = 'float32'
  cms = {'periods': (4, 8), 'blocks': '1,2', 'slots': 1, 'rank': 2}
  cms |= {'differentiate': 'first_order'}  # compiles in half the time
  config.model.cms.update(cms)
  config.pretrained.update({'path': str(folder), 'stack': stack})
  return config


def by_path(params):
  return dict(zip(labels.paths(params), jax.tree.leaves(params)))


def test_without_a_file_a_config_is_left_as_it_is(corpus):
  config = launch_cases.make_config(corpus)
  assert initial.resolve(config) == (config, None)
  config.pretrained.stack = 'groups'
  with pytest.raises(ValueError, match='no model to stack'):
    initial.resolve(config)


@pytest.mark.parametrize(
  'stack', ['', 'groups', pytest.param('copies', marks=pytest.mark.slow)]
)
def test_only_what_is_not_frozen_leaves_the_file_behind(
  stack, corpus, folder, tmp_path
):
  config = make_config(corpus, folder, stack)
  config.opt.freeze = 'embed/.*|blocks/.*'
  config.train.steps = 3
  plan = run.prepare(config, tmp_path)
  cfg = plan.model.cfg
  assert cfg.family == ('hope_attention' if stack else 'transformer')
  assert (cfg.D, cfg.N, cfg.G) == (
    llama_cases.D,
    llama_cases.N,
    llama_cases.G,
  )
  assert cfg.dtype == 'float32' and cfg.cms.slots == 1
  run.train(plan)
  made = trained.load(tmp_path)
  assert made.tokenizer.encode('cab') == [4, 2, 3]
  got = by_path(made.params)
  file = by_path(trained.load_pretrained(folder).params)
  for path, given in file.items():
    same = np.array_equal(got[path], given)
    assert same == (path != 'final_norm/scale'), path
  # what the file cannot have is there all the same
  assert ('log_rate' in got) == bool(stack)
  new = {path for path in got if path not in file} - {'log_rate'}
  assert {p.split('/')[2] for p in new if 'level_0' in p} == {'slots'}
  # and the run goes on
  shutil.rmtree(tmp_path / 'checkpoints' / '3')
  assert trained.load(tmp_path).step == 2
  assert np.isfinite(run.train(run.prepare(config, tmp_path))['loss'])
  assert trained.load(tmp_path).step == 3


def test_another_model_than_the_files_is_refused(corpus, folder, tmp_path):
  config = make_config(corpus, folder)
  config.model.N = 7
  with pytest.raises(ValueError, match=r'model.N is 7, but .* with 3'):
    run.prepare(config, tmp_path)
  config.pretrained.path = str(folder / 'no.gguf')
  with pytest.raises(FileNotFoundError, match=r'no.gguf: there is no such'):
    run.prepare(config, tmp_path)


def test_parameters_that_do_not_fit_are_refused():
  fresh = {'a': {'b': np.zeros(3)}, 'c': np.zeros(2)}
  got = initial.fill(fresh, {'a': {'b': np.ones(3)}})
  assert got['a']['b'].all() and got['c'] is fresh['c']
  with pytest.raises(ValueError, match=r'a/b: given \(4,\), the model has'):
    initial.fill(fresh, {'a': {'b': np.ones(4)}})
  with pytest.raises(ValueError, match=r"a: the model has no \['d'\]"):
    initial.fill(fresh, {'a': {'d': np.ones(4)}})
  with pytest.raises(ValueError, match='a: given .* a group'):
    initial.fill(fresh, {'a': np.ones(4)})
