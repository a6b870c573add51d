"""nestax-lm-eval without lm-eval, or on a device without room."""

import sys
import types

import jax
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


def test_a_device_without_room_is_said_in_a_line(monkeypatch, capsys):
  def full():
    words = 'RESOURCE_EXHAUSTED: Out of memory allocating 37067674760 bytes.'
    raise jax.errors.JaxRuntimeError(words)

  for name, holds in (
    ('nestax.launch.evals.harness', {'Refused': ValueError}),
    ('lm_eval', {}),
    ('lm_eval.__main__', {'cli_evaluate': full}),
  ):
    module = types.ModuleType(name)
    vars(module).update(holds)
    monkeypatch.setitem(sys.modules, name, module)
  with pytest.raises(SystemExit) as stop:
    harness.cli()
  assert stop.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert '34.5 GiB at once: less is needed by a smaller --batch_size' in line
