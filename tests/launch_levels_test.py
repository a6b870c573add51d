"""Levels that learn inside a sequence, through the commands' own paths."""

import launch_cases as cases
import numpy as np
import pytest

from nestax.launch import run, sampling, trained


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return cases.write_corpus(tmp_path_factory.mktemp('corpus'))


def make_config(corpus, **cms):
  config = cases.make_config(corpus, 'hope_attention')
  config.model.cms.update({'periods': (4, 8), 'multiple': 4, **cms})
  return config


def test_a_run_learns_its_rates_and_its_model_goes_on_learning(
  corpus, tmp_path
):
  config = make_config(corpus, blocks='1', rate=0.3)
  final = run.train(run.prepare(config, tmp_path))
  assert np.isfinite(final['loss'])
  made = trained.load(tmp_path)
  rates = np.exp(made.params['log_rate'])
  assert rates.shape == (1, 2)
  assert np.abs(rates - 0.3).min() > 0, 'the inner rates are learned'
  how = sampling.Sampling(temperature=0.0)
  text = ''.join(sampling.text(*made[:3], 'state memory', 6, how))
  assert isinstance(text, str)


def test_levels_that_would_never_learn_are_refused(corpus, tmp_path):
  config = make_config(corpus, blocks='all', periods=(16, 32))
  with pytest.raises(ValueError, match='no level of a row would learn'):
    run.prepare(config, tmp_path)
  config.train.carry_state = True
  run.prepare(config, tmp_path)
