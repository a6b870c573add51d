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
  rows: jax.Array  # how many sequences


def by_row(levels: Sequence[LevelState], surprise_B) -> Telemetry:
  """Reads the states of the levels, fastest first; every leaf has a last B."""
  return Telemetry(
    jnp.stack([level.commits_B.astype(jnp.float32) for level in levels]),
    jnp.stack([level.moved_B for level in levels]),
    jnp.stack([norm(weights(level)) for level in levels]),
    surprise_B,
    jnp.ones_like(surprise_B),
  )


def mean(each: Telemetry, counts_B=None) -> Telemetry:
  """Means of what `by_row` gives, over the rows that count, or over all."""
  if counts_B is None:
    counts_B = jnp.ones_like(each.rows, bool)
  rows = counts_B.sum(dtype=jnp.float32)

  def one(x_B):
    mask_B = jnp.broadcast_to(counts_B, x_B.shape)
    return jnp.where(mask_B, x_B, 0.0).sum(-1) / jnp.maximum(rows, 1.0)

  return Telemetry(*map(one, each[:-1]), rows)


def none() -> Telemetry:
  """Of a model no level of which learns: arrays of no elements."""
  empty_P, zero = jnp.zeros((0,), jnp.float32), jnp.zeros((), jnp.float32)
  return Telemetry(empty_P, empty_P, empty_P, zero, zero)


def sown(variables, counts_B=None) -> Telemetry:
  """What the levels of fresh sequences had done by the sequences' end.

  Args:
    variables: what `model.apply(..., mutable=['telemetry'])` gives beside its
      result.
    counts_B: which rows count, such as those that are no padding; None: all.
  """
  found = variables.get('telemetry')
  return mean(found['levels'][0], counts_B) if found else none()
