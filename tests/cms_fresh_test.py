"""Fresh sequences of first order: read at once as they are by chunks."""

import cms_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.cms import fresh


def read(name, whole):
  """Gives ((outputs, levels, surprise), outer gradients) of the toy."""
  cfg = cases.stream_config(name, 'first_order')
  K, levels = len(cfg.periods), cases.toy_levels(cfg)

  def run(slow, rates, x_BxLxD, reset_BxL):
    net = cases.toy(slow, cases.STREAMS[name][3], whole and cfg.periods)
    piece = cases.piece(x_BxLxD, reset_BxL)
    y, *end = fresh.run(cfg, net, rates, levels, cases.toy_mixers(), piece)
    return jnp.sum(jnp.sin(y)), (y, *end)

  grad = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))
  slow, rates, x_BxLxD = cases.inputs()

  def of(reset_BxL):
    grads, found = grad(slow[:K], rates[:K], x_BxLxD, reset_BxL)
    return found, grads

  return of


@pytest.mark.parametrize(
  'name',
  [
    'longer than the stream',
    pytest.param('nested', marks=pytest.mark.slow),
  ],
)
def test_at_once_is_by_chunks_in_values_and_outer_gradients(name):
  at_once, by_chunks = read(name, True), read(name, False)
  for reset_BxL in (np.zeros((cases.B, cases.L), bool), cases.resets()):
    got, want = at_once(reset_BxL), by_chunks(reset_BxL)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4),
      got,
      want,
    )
  # the rates of levels that commit are learned
  for period, rate_n in zip(cases.STREAMS[name][0], want[1][1]):
    assert (np.abs(rate_n).min() > 1e-4) == (period < cases.L)


@pytest.mark.parametrize('optimizer, nested', [('dgd', True), ('dgd', False)])
def test_writes_in_proportion_to_two_rates_are_read_by_chunks(
  monkeypatch, optimizer, nested
):
  streams = {'it': ((3, 9), optimizer, nested, True)}
  monkeypatch.setattr(cases, 'STREAMS', streams)
  cfg = cases.stream_config('it', 'first_order')
  slow, rates, x_BxLxD = cases.inputs()

  def run():
    net = cases.toy(slow[:2])
    whole, own = lambda writes, piece: 'at once', lambda k, delta: delta
    net = net._replace(whole=whole, own=own)
    given = cases.toy_levels(cfg), cases.toy_mixers(), cases.piece(x_BxLxD)
    found.append(fresh.run(cfg, net, rates[:2], *given)[0])

  found = []
  jax.eval_shape(run)
  assert (found == ['at once']) == (not nested)
