"""What programs with flags of their own do with their command lines."""

import pytest
from absl import flags

from nestax.launch import command


def make():
  values = flags.FlagValues()
  steps = flags.DEFINE_integer('steps', 3, 'How many.', flag_values=values)
  flags.DEFINE_string('prompt', '', 'What to say.', flag_values=values)
  flags.DEFINE_bool('loud', False, 'Say it aloud.', flag_values=values)
  return command.parser('counting', 'Counts.', values), steps


def test_flags_are_parsed_and_the_rest_is_given_back():
  parse, steps = make()
  assert parse(['prog', '--steps=5', 'word']) == ['prog', 'word']
  assert steps.value == 5


@pytest.mark.parametrize(
  'wrong, words',
  [
    ('--stops=5', "Unknown command line flag 'stops'. Did you mean: steps ?"),
    # the key of a config, but these flags have none
    ('--length=5', "Unknown command line flag 'length'"),
    ('--steps=many', 'flag --steps=many: a whole number is wanted'),
    ('--loud=so', 'flag --loud=so: True or False is wanted'),
  ],
)
def test_a_wrong_flag_is_said_and_ends_with_2(wrong, words, capsys):
  with pytest.raises(SystemExit) as stop:
    make()[0](['prog', wrong])
  assert stop.value.code == 2
  assert capsys.readouterr().err == f'counting: {words}\n'


@pytest.mark.parametrize(
  'words',
  [
    ['--help'],
    ['-h'],
    ['-help'],
    ['--help=true'],
    ['--help=steps'],
    ['--steps=5', '-h'],
    ['--steps', '5', '-h'],
    ['--loud', '-h'],
    ['word', '--help'],
  ],
  ids=' '.join,
)
def test_help_lists_the_flags_and_ends_with_0(words, capsys):
  with pytest.raises(SystemExit) as stop:
    make()[0](['prog', *words])
  assert stop.value.code == 0
  said = capsys.readouterr().out
  assert said.startswith('Counts.\n') and '--steps' in said
  assert 'flagfile' not in said and 'quickstart' not in said


@pytest.mark.parametrize(
  'word', ['--nohelp', '-nohelp', '--help=false', '-help=False', '--help=0']
)
def test_no_help_may_be_asked_for(word, capsys):
  parse, steps = make()
  assert parse(['prog', word, '--steps', '5', 'word']) == ['prog', 'word']
  assert steps.value == 5 and not capsys.readouterr().out
  with pytest.raises(SystemExit) as stop:
    parse(['prog', word, '--help'])
  assert stop.value.code == 0


@pytest.mark.parametrize('word', ['-h', '--help', '--help=true', '--nohelp'])
def test_the_value_of_a_flag_asks_for_no_help(word, capsys):
  parse, steps = make()
  values = ['--prompt', word, '--steps', '5']
  assert parse(['prog', *values, '--', word]) == ['prog', word]
  assert steps.value == 5 and not capsys.readouterr().out


def test_help_of_a_command_with_a_config_names_those_that_come_along(capsys):
  values = flags.FlagValues()
  with pytest.raises(SystemExit):
    command.parser('x', 'X.', values, 'tiny')(['prog', '--help'])
  said = capsys.readouterr().out
  assert 'hope_30m' in said and 'configs/common.py' in said
