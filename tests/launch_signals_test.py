"""What processes agree on: any signal that one of them has noted."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from nestax.launch import signals


@pytest.fixture
def mesh():
  return Mesh(np.array(jax.devices()).reshape(-1, 1), ('data', 'model'))


def test_a_process_alone_knows_at_once(mesh):
  agreed = signals.Agreement(mesh)
  assert [agreed(number) for number in (0, 15, 0)] == [0, 15, 0]


def test_of_several_all_hear_what_one_noted_at_the_call_before(
  mesh, monkeypatch
):
  """The device that is not first stands for another process."""
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  whole, others = jax.make_array_from_callback, [0, 15, 0, 0]

  def noted(shape, sharding, mine):
    elsewhere = np.full(1, others.pop(0), np.int32)

    def one(index):
      return elsewhere if (index[0].start or 0) else mine(index)

    return whole(shape, sharding, one)

  monkeypatch.setattr(jax, 'make_array_from_callback', noted)
  agreed = signals.Agreement(mesh)
  assert mesh.size > 1
  # what came in the call before: nothing, then the other's, then one's own
  assert [agreed(number) for number in (0, 0, 2, 0)] == [0, 0, 15, 2]
