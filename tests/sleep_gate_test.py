"""The gate rolls back what harms, and the lineage says so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.sleep import gate
from nestax.sleep.gate import GateConfig, Lineage, LineageError, Version

BEFORE = {'core': 2.0, 'day': 4.0}


@pytest.mark.parametrize(
  'after, accepted, words',
  [
    ({'core': 2.0, 'day': 3.0}, True, 'accepted: core loss'),
    ({'core': 2.019, 'day': 3.0}, True, 'accepted'),
    ({'core': 2.03, 'day': 1.0}, False, 'core loss rose by 1.50%'),
    ({'core': 2.0, 'day': 4.1}, False, "the day's content fell by -2.50%"),
    ({'core': float('nan'), 'day': 3.0}, False, 'core is nan'),
    ({'core': 2.0, 'day': float('inf')}, False, 'day is inf'),
  ],
)
def test_decisions(after, accepted, words):
  decision = gate.decide(GateConfig(core=0.01), BEFORE, after)
  assert decision.accepted == accepted
  assert words in decision.reason


def test_losses_are_means_over_tokens_that_count():
  reader = cases.table_reader()
  table = jax.random.normal(jax.random.key(0), (4, 4))
  tokens = np.random.default_rng(0).integers(0, 4, (5, 6))
  length = np.array([6, 3, 1, 2, 6])
  logs = np.asarray(jax.nn.log_softmax(table))
  nats = [
    [-logs[a, b] for a, b in zip(row[: n - 1], row[1:n])]
    for row, n in zip(tokens, length)
  ]
  rows = gate.row_losses(
    reader, table, None, jnp.asarray(tokens), jnp.asarray(length)
  )
  want = [np.mean(x) if x else 0.0 for x in nats]
  np.testing.assert_allclose(rows, want, rtol=1e-5)
  for at_a_time in (2, 5, 8):
    got = gate.loss(reader, table, None, tokens, length, at_a_time)
    np.testing.assert_allclose(got, np.mean(sum(nats, [])), rtol=1e-5)


def version(n, parent, accepted=True):
  return Version(n, parent, {'steps': 3}, {'core': 1.5}, accepted, 'why')


def test_the_lineage_remembers(tmp_path):
  lineage = Lineage(tmp_path / 'lineage.jsonl')
  assert lineage.current() is None
  for v in (version(0, -1), version(1, 0), version(2, 1, accepted=False)):
    lineage.add(v)
  again = Lineage(tmp_path / 'lineage.jsonl')
  assert [v.version for v in again.versions()] == [0, 1, 2]
  assert again.current().version == 1
  assert again.versions()[0].time
  assert dataclasses.replace(again.current(), time='') == version(1, 0)
  assert [p.name for p in tmp_path.iterdir()] == ['lineage.jsonl']


def test_a_line_that_cannot_be_is_refused_and_nothing_is_written(tmp_path):
  lineage = Lineage(tmp_path / 'lineage.jsonl')
  lineage.add(version(0, -1))
  lineage.add(version(1, 0, accepted=False))
  there = lineage.path.read_bytes()
  for bad, words in (
    (version(3, 0), 'the next is 2'),
    (version(2, 1), 'no accepted version'),
    (version(2, 7), 'no accepted version'),
  ):
    with pytest.raises(LineageError, match=words):
      lineage.add(bad)
  assert lineage.path.read_bytes() == there


def test_a_write_that_fails_leaves_the_lineage(tmp_path, monkeypatch):
  lineage = Lineage(tmp_path / 'lineage.jsonl')
  lineage.add(version(0, -1))
  there = lineage.path.read_bytes()

  def no_room(fd):
    raise OSError('no space left')

  monkeypatch.setattr(gate.os, 'fsync', no_room)
  with pytest.raises(OSError, match='no space'):
    lineage.add(version(1, 0))
  assert lineage.path.read_bytes() == there


def test_a_damaged_lineage_is_named(tmp_path):
  (tmp_path / 'x').write_text('{"version": 0}\n')
  with pytest.raises(LineageError, match='line 1: not a line of a lineage'):
    Lineage(tmp_path / 'x').versions()


@pytest.mark.parametrize('values', [{'core': -0.1}, {'day': 1.0}], ids=str)
def test_impossible_margins_are_refused(values):
  with pytest.raises(ValueError, match=f'{next(iter(values))}='):
    GateConfig(**values)
