"""What a step's time goes on is named, and adds up."""

import jax
import jax.numpy as jnp
import pytest

from nestax.launch.benches import trace


@jax.jit
def _step(x_LxD):
  with jax.named_scope('dear'):
    square = jnp.sort(jnp.tile(x_LxD.ravel(), 8)).sum()

  def turn(carry, _):
    return jnp.sin(carry) + carry @ carry / 64, None

  with jax.named_scope('cheap'):
    return square + jax.lax.scan(turn, x_LxD, None, length=4)[0].sum()


@pytest.fixture(scope='module')
def rows():
  x = jax.random.normal(jax.random.key(0), (64, 64))
  compiled = _step.lower(x).compile()
  return trace.top(lambda: compiled(x), compiled.as_text(), 6)


def test_the_dearest_comes_first_with_its_scope(rows):
  assert 'dear' in rows[0]['from'] and 'sort' in rows[0]['from']
  assert rows[0]['share'] > 0.5
  assert rows[0]['ms'] >= rows[1]['ms'] > 0


def test_shares_add_up_and_loops_are_not_counted_beside_their_bodies(rows):
  assert len(rows) == 7 and rows[-1]['operation'].endswith('others')
  assert sum(row['share'] for row in rows) == pytest.approx(1)
  assert not any(row['operation'].startswith('while') for row in rows)
  # what is inside the loop ran once a turn
  assert [row for row in rows if row['times'] == 4 and 'cheap' in row['from']]
