"""nestax-lm-eval where lm-eval is not installed."""

import sys

import pytest

from nestax.launch import harness


def test_the_extra_that_is_missing_is_named(monkeypatch, capsys):
  for name in [*sys.modules]:
    if name.split('.')[0] == 'lm_eval':
      monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, 'lm_eval', None)  # cannot be imported
  ours = 'nestax.launch.evals.harness'
  monkeypatch.delitem(sys.modules, ours, raising=False)
  with pytest.raises(SystemExit) as stop:
    harness.cli()
  assert stop.value.code == 2
  out, err = capsys.readouterr()
  assert not out and err.startswith(
    'nestax-lm-eval: lm-eval cannot be imported'
  )
  assert err.endswith("pip install '.[eval]'\n") and err.count('\n') == 1
