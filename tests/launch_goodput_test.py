"""Every moment belongs to one kind, and all of them are all the time."""

import pytest

from nestax.launch import goodput


@pytest.fixture
def clock(monkeypatch):
  """Seconds that go by only as the test says."""
  now = [100.0]
  monkeypatch.setattr(goodput.time, 'perf_counter', lambda: now[0])

  def wait(seconds):
    now[0] += seconds

  return wait


def test_time_goes_to_the_kind_that_was_turned_to(clock):
  spent = goodput.Goodput()
  clock(1)
  for _ in range(2):
    spent.turn('data')
    clock(1)
    spent.call('step', 'compute')
    clock(3)
  want = {'other': 1, 'data': 2, 'compile': 3, 'compute': 3}
  fractions = {f'time_{k}': want.get(k, 0) / 9 for k in goodput.KINDS}
  assert spent.read() == pytest.approx(fractions)
  # what is going on when it is read is not lost, and read once
  clock(4)
  spent.turn('checkpoint')
  clock(1)
  since = {'compute': 0.8, 'checkpoint': 0.2}
  fractions = {f'time_{k}': since.get(k, 0) for k in goodput.KINDS}
  assert spent.read() == pytest.approx(fractions)
  assert spent.words() == (
    '50.0% compute, 21.4% compile, 14.3% data, 7.1% other, 7.1% checkpoint, '
    '0.0% evaluate'
  )


def test_no_time_is_no_fraction(clock):
  assert set(goodput.Goodput().read().values()) == {0}
