"""What a night is to leave as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.sleep import texts
from nestax.sleep.reader import Said
from nestax.sleep.texts import TextsConfig


def speak(prompts, key):
  full = jnp.full_like(prompts.length_B, 10)
  return prompts._replace(tokens_BxL=prompts.tokens_BxL + 1, length_B=full)


def past(rows):
  one = np.ones(rows, np.int32)
  return Said(np.full((rows, 10), 5, np.int32), one, 10 * one)


@pytest.mark.parametrize('said, rows', [(3, 0), (0, 2), (3, 2), (0, 0)])
def test_kept_are_texts_from_the_beginning_and_those_of_earlier_days(
  said, rows
):
  cfg = TextsConfig(length=10, kept=said)
  made = texts.kept(
    cfg, 7, speak, jax.random.key(0), past(rows) if rows else None
  )
  if not said + rows:
    assert made is None
    return
  want = [8] * said + [5] * rows
  np.testing.assert_array_equal(made.tokens_BxL[:, 0], want)
  np.testing.assert_array_equal(made.start_B, np.ones(said + rows))
  np.testing.assert_array_equal(made.length_B, np.full(said + rows, 10))


def test_fewer_than_none_are_refused():
  with pytest.raises(ValueError, match='kept=-1'):
    TextsConfig(kept=-1)
