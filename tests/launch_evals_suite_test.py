"""Options are set in words, and models are named."""

import pytest
import suite_cases as cases

from nestax.launch.evals import entrants, suite


def test_words_for_nobody_are_refused():
  for words, wrong in (
    ('mode.bonus=1', 'one of made'),
    ('made.bonny=1', 'there are bonus'),
    ('made.bonus=x', 'is no number'),
  ):
    with pytest.raises(ValueError, match=wrong):
      suite.configure([cases.evaluation([])], [words])


def test_models_are_families_with_keys_or_paths(tmp_path):
  base = {'D': 16, 'memory': {'chunk_mem': 8, 'chunk_rest': 8}}
  word = 'hope:memory.eta_max=1.0;cms.periods=(8,16)'
  cfg = entrants.config(word, base)
  assert (cfg.family, cfg.D, cfg.V) == ('hope', 16, 272)
  assert cfg.memory.chunk_mem == 8 and cfg.memory.eta_max == 1.0
  assert cfg.cms.periods == (8, 16)
  for wrong, words in (
    ('hop', 'trains its models; give families, of .*hope'),
    (str(tmp_path), 'trains its models; give families, of .*hope'),
    ('hope:eta=1', "there is no key 'eta'"),
    ('hope:D=1.5', 'D is a int'),
  ):
    with pytest.raises(ValueError, match=words):
      entrants.config(wrong, base)
  assert entrants.is_trained(str(tmp_path))
  for lacks in (entrants.load, entrants.check):
    with pytest.raises(ValueError, match='neither a folder of a run nor'):
      lacks(str(tmp_path / 'nothing'))
  entrants.check(str(tmp_path))
