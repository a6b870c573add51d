"""The order in which steps are made, read and left."""

import types

import pytest

from nestax.launch import loop, signals


class _Clock:
  """Each look at it comes a second after the one before."""

  def __init__(self):
    self.now = 0.0

  def monotonic(self) -> float:
    self.now += 1.0
    return self.now


@pytest.fixture
def events(monkeypatch):
  """What happens in turn, in a run whose every step takes a second."""
  seen = []

  def one(_, state, number):
    seen.append(f'make {number}')
    return state, number

  def report(_, number, fresh):
    assert number == fresh
    seen.append(f'read {number}')
    return {'bad': 0.0}

  def pause(_, state, number, bad, stop):
    seen.append(f'pause {number}')
    if stop:
      raise signals.Interrupted('', stop)

  for name, stand_in in (('_one', one), ('_report', report)):
    monkeypatch.setattr(loop, name, stand_in)
  monkeypatch.setattr(loop, '_pause', pause)
  monkeypatch.setattr(loop, '_catch_up', lambda *_: None)
  monkeypatch.setattr(loop, 'time', _Clock())
  return seen


def _run(stop_at: int, seen):
  every = types.SimpleNamespace(every=0)
  config = types.SimpleNamespace(eval=every, checkpoint=every)
  fake = types.SimpleNamespace(
    plan=types.SimpleNamespace(config=config),
    done=0,
    last=9,
    stopped=lambda: 15 if f'make {stop_at}' in seen else 0,
  )
  with pytest.raises(signals.Interrupted):
    loop.run(fake, None)


def test_a_step_is_read_while_the_next_is_under_way(events):
  _run(3, events)
  assert events == [
    *('make 1', 'make 2', 'read 1', 'make 3', 'read 2', 'read 3'),
    'pause 3',
  ]


def test_long_steps_are_alone_so_that_a_signal_waits_for_one(
  events, monkeypatch
):
  monkeypatch.setattr(loop, 'LONG', 0.5)
  _run(3, events)
  assert events == [
    *('make 1', 'make 2', 'read 1', 'read 2', 'make 3', 'read 3'),
    'pause 3',
  ]
