"""What levels that learn did, in numbers that a person can read."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nestax.cms.level import LevelState, norm, weights


class Telemetry(NamedTuple):
  """What the levels did, float32, by period P, means over sequences."""

  commits_P: jax.Array  # commits that wrote something, so far
  moved_P: jax.Array  # Frobenius norm of the last update
  size_P: jax.Array  # Frobenius norm of all that is written
  surprise: jax.Array  # inner objective of the last chunk learned from


def of_levels(levels: Sequence[LevelState], surprise_B) -> Telemetry:
  """Reads the states of the levels, fastest first."""
  return Telemetry(
    jnp.stack([level.commits_B.mean() for level in levels]),
    jnp.stack([level.moved_B.mean() for level in levels]),
    jnp.stack([norm(weights(level)).mean() for level in levels]),
    surprise_B.mean(),
  )


def none() -> Telemetry:
  """Of a model no level of which learns: arrays of no elements."""
  empty_P = jnp.zeros((0,), jnp.float32)
  return Telemetry(empty_P, empty_P, empty_P, jnp.zeros((), jnp.float32))


def sown(variables) -> Telemetry:
  """What the levels of fresh sequences had done by the sequences' end.

  Args:
    variables: what `model.apply(..., mutable=['telemetry'])` gives beside its
      result.
  """
  found = variables.get('telemetry')
  return found['levels'][0] if found else none()
