"""Words set fields of nested configs, or are refused in words."""

import dataclasses

import pytest

from nestax.launch import overrides
from nestax.launch.sleep_options import Options


def test_words_set_fields_of_any_depth_by_their_type():
  words = ['piece=7', 'surprise=2.5', 'night.full=merge']
  words += ['night.seed.steps=3', 'night.seed.rate=1e-4', 'night.every=2']
  got = overrides.apply(Options(), words)
  assert (got.piece, got.surprise, got.night.full) == (7, 2.5, 'merge')
  assert (got.night.seed.steps, got.night.seed.rate) == (3, 1e-4)
  usual = Options().night.seed
  want = dataclasses.replace(got.night.seed, steps=usual.steps, rate=usual.rate)
  assert want == usual and got.night.every == 2


@dataclasses.dataclass(frozen=True)
class Odd:
  yes: bool = False
  many: tuple = ()


def test_truth_is_spelled_out():
  assert overrides.apply(Odd(), ['yes=True']).yes is True
  assert overrides.apply(Odd(True), ['yes=false']).yes is False
  with pytest.raises(ValueError, match='true or false'):
    overrides.apply(Odd(), ['yes=1'])
  with pytest.raises(ValueError, match='flag of its own'):
    overrides.apply(Odd(), ['many=1'])


@pytest.mark.parametrize(
  'word, words',
  [
    ('piece', "'piece': give it as key=value"),
    ('pice=3', "no key 'pice'; there are nights"),
    ('night.sede.steps=3', "no key 'sede'; there are seed"),
    ('night=3', 'night is a group; give night.KEY=value'),
    ('piece.x=3', 'piece is no group'),
    ('piece=3.5', "'3.5' is no whole number"),
    ('night.seed.rate=fast', "'fast' is no number"),
    ('piece=0', 'piece=0: at least 1'),
    ('night.full=maybe', "full='maybe'"),
  ],
)
def test_what_cannot_be_set_is_refused_in_words(word, words):
  with pytest.raises(ValueError, match=words):
    overrides.apply(Options(), [word])
