"""Schedules of polynomials: what they do to an interval of singular values."""

import numpy as np
import pytest

from nestax.optim import coefficients


def apply(triples, values):
  for a, b, c in triples:
    values = a * values + b * values**3 + c * values**5
  return values


@pytest.mark.parametrize(('steps', 'lower'), [(5, 3e-2), (8, 1e-3), (10, 1e-4)])
def test_polar_express_brings_the_interval_to_one(steps, lower):
  values = apply(
    coefficients.polar_express(steps, lower), np.geomspace(lower, 1, 10_001)
  )
  assert 0.97 < values.min() and values.max() < 1.03


def test_one_more_step_is_never_worse():
  values = np.geomspace(1e-3, 1, 1001)
  errors = [
    np.abs(apply(coefficients.polar_express(n), values) - 1).max()
    for n in range(3, 10)
  ]
  assert np.all(np.diff(errors) < 1e-6)


@pytest.mark.parametrize('steps', [2, 3, 4])
def test_both_ends_of_the_interval_are_equally_far_from_one(steps):
  triples = coefficients.polar_express(steps, 1e-3)
  values = apply(triples, np.geomspace(1e-3, 1, 10_001))
  np.testing.assert_allclose(1 - values.min(), values.max() - 1, rtol=5e-2)


def test_a_single_step_has_the_least_largest_error_of_all_quintics():
  triple = np.array(coefficients.polar_express(1, 0.1)[0])
  values = np.linspace(0.1, 1, 2001)

  def error(triple):
    return np.abs(apply([triple], values) - 1).max()

  for direction in np.random.default_rng(0).normal(size=(200, 3)):
    assert error(triple + 1e-3 * direction) > error(triple)


def test_the_cubic_ends_at_one():
  values = apply(coefficients.cubic(20), np.geomspace(1e-2, 1, 100))
  np.testing.assert_allclose(values, 1, atol=1e-6)


@pytest.mark.parametrize('make', [coefficients.quintic, coefficients.cubic])
def test_no_steps_are_refused(make):
  for steps in (0, 2.5):
    with pytest.raises(coefficients.CoefficientError, match=f'is {steps}: '):
      make(steps)


@pytest.mark.parametrize('bad', [{'lower': 0.0}, {'cushion': 2.0}])
def test_numbers_out_of_range_are_refused(bad):
  with pytest.raises(
    coefficients.CoefficientError, match='above 0, and below 1'
  ):
    coefficients.polar_express(5, **bad)


@pytest.mark.parametrize('bad', [(), ((1.0, 2.0),), ((1, 2, np.nan),), 3])
def test_what_are_no_triples_is_refused(bad):
  with pytest.raises(coefficients.CoefficientError, match='have to be triples'):
    coefficients.read(bad)


@pytest.mark.parametrize('form', [iter, np.array, list])
def test_triples_of_any_form_are_read_once_into_floats(form):
  assert coefficients.read(form(coefficients.MUON)) == coefficients.MUON
