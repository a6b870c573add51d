"""Levels that learn inside a sequence, through the commands' own paths."""

import flax.linen as nn
import jax
import launch_cases as cases
import numpy as np
import pytest

from nestax.launch import metrics, run, sampling, trained
from nestax.launch import step as steps
from nestax.launch.data import packing
from nestax.models import language_model
from nestax.models.config import ModelConfig


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return cases.write_corpus(tmp_path_factory.mktemp('corpus'))


def make_config(corpus, **cms):
  config = cases.make_config(corpus, 'hope_attention')
  config.model.N = 1
  usual = {'periods': (4, 8), 'multiple': 4, 'differentiate': 'first_order'}
  config.model.cms.update(usual | cms)
  return config


def test_a_run_learns_its_rates_and_its_model_goes_on_learning(
  corpus, tmp_path, capsys
):
  config = make_config(corpus, blocks='all', rate=0.3)
  final = run.train(run.prepare(config, tmp_path))
  assert np.isfinite(final['loss'])
  rows = [row for row in metrics.read(tmp_path / 'metrics.jsonl')]
  row = [row for row in rows if row['split'] == 'valid'][-1]
  assert 0 < row['level_1_commits'] <= 2 < row['level_0_commits'] <= 4
  assert min(row[f'level_{k}_{name}'] for k in (0, 1) for name in metrics.LEVEL)
  assert 0 < row['surprise'] < 2 * np.log(272)
  said = capsys.readouterr().out
  assert f'{row["level_1_commits"]:.1f} commits a row' in said
  assert (tmp_path / 'levels.png').stat().st_size > 10_000
  made = trained.load(tmp_path)
  rates = np.exp(made.params['log_rate'])
  assert rates.shape == (1, 2)
  np.testing.assert_allclose(rates[0, 1], row['level_1_rate'], rtol=1e-5)
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


def test_validation_says_nothing_of_rows_that_are_padding(corpus):
  config = make_config(corpus, blocks='all', rate=0.3)
  cfg = ModelConfig.from_dict(config.model)
  model = language_model.LanguageModel(cfg)
  step, rng = steps.eval_step(model), np.random.default_rng(0)
  row = packing.empty_rows(1, config.data.length, 0)
  row['tokens'] = rng.integers(0, 256, row['tokens'].shape).astype(np.int32)
  row['weights'] = np.ones_like(row['weights'])
  rest = packing.empty_rows(3, config.data.length, 0)
  both = {key: np.concatenate([row[key], rest[key]]) for key in row}
  params = model.init(jax.random.key(0), None, row['tokens'])['params']
  (_, want), (_, got) = (step(nn.unbox(params), batch) for batch in (row, both))
  assert got.rows == 1 and got.commits_P.min() > 0
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-5)
