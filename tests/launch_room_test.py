"""Every command says in a line that a device has no room."""

import re

import jax
import pytest

from nestax.launch import (
  bench,
  generate,
  nights,
  sampling,
  sleep,
  sleep_flags,
  trained,
)
from nestax.launch.benches import optim
from nestax.launch.evals import novel, novel_command, running, suites

FULL = 'RESOURCE_EXHAUSTED: Out of memory allocating 37067674760 bytes.'
# the command, its flags, what is made before, what is full, what takes less
COMMANDS = {
  'text': (novel_command, ['--text=a'], (novel, 'load'), (novel, 'run'),
           r'what it reads, .*\(--piece\)'),
  'suite': (suites, ['--suite=mad'], None, (running, 'run'),
            r'what is evaluated, .*\(--set\)'),
  'generate': (generate, ['--prompt=a'], (trained, 'choose'),
               (sampling, 'text'), 'its state, .* a smaller model'),
  'sleep': (sleep, ['--text=a'], (sleep_flags, 'plan'), (nights, 'live'),
            r'its nights, .*\(--set=night.seed.rows\)'),
  'bench': (bench, ['optim'], None, (optim, 'main'), 'timed, .*its flags'),
}  # fmt: skip


@pytest.mark.parametrize('name', COMMANDS)
def test_a_device_without_room_is_said_in_a_line(name, monkeypatch, capsys):
  program, words, made, full, less = COMMANDS[name]

  def fill(*args, **options):
    raise jax.errors.JaxRuntimeError(FULL)

  if made:
    monkeypatch.setattr(*made, lambda *args: (None, None, None))
  monkeypatch.setattr(*full, fill)
  argv = [f'nestax-{name}', *words]
  if program is not bench:  # which reads its flags itself
    for flag in program.FLAGS:  # of an earlier call
      program.FLAGS[flag].unparse()
    argv = program.FLAGS(argv)
  assert program.main(argv) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert '34.5 GiB at once: less is needed by' in line
  assert re.search(less, line)
