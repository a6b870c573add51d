"""Every command says in a line that a device has no room."""

import operator
import re

import jax
import pytest

from nestax.launch import (
  bench,
  generate,
  nights,
  room,
  sampling,
  sleep,
  sleep_flags,
  sleep_options,
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


@pytest.mark.parametrize('early', (False, True))
@pytest.mark.parametrize('name', COMMANDS)
def test_a_device_without_room_is_said_in_a_line(
  name, early, monkeypatch, capsys
):
  program, words, made, full, less = COMMANDS[name]
  full = early and made or full

  def fill(*args, **options):
    raise jax.errors.JaxRuntimeError(FULL)

  if made and not early:
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
  if program is bench:
    return
  for flag in re.findall(r'--(\w+)', line):  # there is what it names
    assert flag in program.FLAGS
  for key in re.findall(r'--set=([\w.]+)', line):
    assert operator.attrgetter(key)(sleep_options.Options()) is not None


@pytest.mark.parametrize('memory', ('', 'memory'))
def test_a_kernel_is_left_out_where_that_can_be_said(memory):
  words = 'RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 9, '
  with pytest.raises(room.OutOfMemory) as caught:
    with room.wanted('it', 'less', memory):
      raise jax.errors.JaxRuntimeError(words + 'available: 8, context: []')
  assert ('memory.implementation=scan' in str(caught.value)) == bool(memory)
