"""Rewards against a plain edit distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.sleep import imitate


def plain(a, b):
  """Wagner and Fischer's table, cell by cell."""
  table = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
  for i, x in enumerate(a, 1):
    for j, y in enumerate(b, 1):
      table[i][j] = min(
        table[i - 1][j] + 1,
        table[i][j - 1] + 1,
        table[i - 1][j - 1] + (x != y),
      )
  return table[-1][-1]


def rows(seed, B, L, V):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, V, (B, L), dtype=np.int32)
  return tokens, rng.integers(0, L + 1, B).astype(np.int32)


@pytest.mark.parametrize('V', [2, 5])
@pytest.mark.parametrize('L, M', [(9, 9), (4, 11), (11, 3)])
def test_distances_are_those_of_the_plain_table(L, M, V):
  (a, a_B), (b, b_B) = rows(0, 64, L, V), rows(1, 64, M, V)
  a_B[:3], b_B[1:4] = 0, 0  # empty ones too
  got = jax.jit(imitate.levenshtein)(a, a_B, b, b_B)
  want = [plain(x[:n], y[:m]) for x, n, y, m in zip(a, a_B, b, b_B)]
  np.testing.assert_array_equal(got, want)
  assert got.dtype == jnp.int32


def test_what_is_behind_the_end_does_not_count():
  (a, a_B), (b, b_B) = rows(0, 8, 6, 3), rows(1, 8, 6, 3)
  other = np.where(np.arange(6) < a_B[:, None], a, 99).astype(np.int32)
  one = imitate.levenshtein(a, a_B, b, b_B)
  np.testing.assert_array_equal(one, imitate.levenshtein(other, a_B, b, b_B))


def test_reward_falls_with_the_distance_and_stops_at_the_bound():
  said = np.array([[1, 2, 3, 4], [1, 2, 3, 9], [1, 2, 9, 9], [1, 9, 9, 9]])
  want = np.array([[1, 2, 3, 4]] * 4)
  n = np.full(4, 4)
  np.testing.assert_allclose(
    imitate.r_abs(said, n, want, n), [1.0, 0.75, 0.5, 0.0]
  )
  np.testing.assert_allclose(
    imitate.r_abs(said, n, want, n, bound=0.3), [1.0, 0.75, 0.0, 0.0]
  )


def test_saying_nothing_pays_only_where_nothing_was_said():
  tokens = np.zeros((2, 3), np.int32)
  got = imitate.r_abs(tokens, np.array([0, 0]), tokens, np.array([0, 3]))
  np.testing.assert_array_equal(got, [1.0, 0.0])


def test_agreement_is_the_share_of_first_choices_among_what_counts():
  tokens = np.array([[0, 1, 2, 3], [0, 1, 2, 3]])
  first = np.array([[0, 1, 0, 0], [0, 1, 3, 3]])
  logits = jax.nn.one_hot(first, 4)
  mask = np.array([[True] * 4, [False, True, True, False]])
  got = imitate.agreement(logits, tokens, mask)
  np.testing.assert_allclose(got, [0.5, 0.5])


@pytest.mark.parametrize('gamma, want', [(0.0, 0.2), (1.0, 0.8), (0.5, 0.5)])
def test_rewards_are_mixed_by_gamma(gamma, want):
  got = imitate.combine(jnp.array([0.8]), jnp.array([0.2]), gamma)
  np.testing.assert_allclose(got, [want], rtol=1e-6)
