"""The learning rate rises, falls to its fraction, and refuses bad numbers."""

import jax
import numpy as np
import pytest

from nestax.optim import schedules


def test_warmup_reaches_the_peak_and_cosine_the_fraction():
  schedule = schedules.warmup_cosine(2.0, 10, 110, 0.1)
  np.testing.assert_allclose(schedule(0), 0.2, rtol=1e-6)
  np.testing.assert_allclose(schedule(9), 2.0, rtol=1e-6)
  np.testing.assert_allclose(schedule(10), 2.0, rtol=1e-6)
  np.testing.assert_allclose(schedule(60), 1.1, rtol=1e-6)
  np.testing.assert_allclose(schedule(110), 0.2, rtol=1e-6)
  np.testing.assert_allclose(schedule(5000), 0.2, rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
  assert schedules.warmup_cosine(1.0, 0, 5)(0) == 1.0


def test_it_works_under_jit_with_integer_steps():
  schedule = schedules.warmup_cosine(1.0, 2, 10)
  np.testing.assert_allclose(
    jax.jit(schedule)(np.int32(1)), schedule(1), rtol=1e-6
  )


@pytest.mark.parametrize(
  ('numbers', 'word'),
  [
    ((0.0, 1, 10, 0.1), 'above 0'),
    ((float('nan'), 1, 10, 0.1), 'above 0'),
    ((float('inf'), 1, 10, 0.1), 'above 0, and finite'),
    ((1.0, 10, 10, 0.1), '10 steps of 10'),
    ((1.0, -1, 10, 0.1), 'at least 0'),
    ((1.0, 0, 0, 0.1), 'at least 1'),
    ((1.0, 1, 10, 1.5), 'between 0 and 1'),
  ],
)
def test_numbers_out_of_range_are_refused_in_words(numbers, word):
  with pytest.raises(schedules.ScheduleError, match=word):
    schedules.warmup_cosine(*numbers)
