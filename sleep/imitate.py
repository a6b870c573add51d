"""Rewards for imitating the teacher: `r = gamma r_sem + (1 - gamma) r_abs`.

Sleep section 2.3, item 3: the student completes a prefix of what the teacher
said, and is paid for saying the same, in words (`r_abs`, edit distance) and in
meaning (`r_sem`).
"""

import jax
import jax.numpy as jnp


def levenshtein(a_BxL, a_B, b_BxM, b_B):
  """Edit distance of each pair of padded token rows, int32 `[B]`.

  Args:
    a_BxL: int32 tokens.
    a_B: how many of each row count, 0 to L.
    b_BxM: the others, of any length M.
    b_B: how many of each row count, 0 to M.
  """
  B, M = b_BxM.shape
  place_1xM1 = jnp.arange(M + 1, dtype=jnp.int32)[None]
  first_BxM1 = jnp.broadcast_to(place_1xM1, (B, M + 1))

  def row(above_BxM1, token):
    i, token_B = token
    replaced = above_BxM1[:, :-1] + (token_B[:, None] != b_BxM)
    least = jnp.minimum(above_BxM1[:, 1:] + 1, replaced)
    least = jnp.concatenate([jnp.full((B, 1), i + 1, jnp.int32), least], 1)
    # insertions run along the row: min over k <= j of least_k + (j - k)
    new = jax.lax.cummin(least - place_1xM1, axis=1) + place_1xM1
    return jnp.where((i < a_B)[:, None], new, above_BxM1), None

  rows = jnp.arange(a_BxL.shape[1], dtype=jnp.int32), a_BxL.T
  last_BxM1, _ = jax.lax.scan(row, first_BxM1, rows)
  return jnp.take_along_axis(last_BxM1, b_B[:, None], 1)[:, 0]


def r_abs(a_BxL, a_B, b_BxM, b_B, bound: float = 0.5):
  """`1 - z / max(|a|, |b|)` up to a distance of z0, 0 beyond it, float32 `[B]`.

  Args:
    a_BxL: int32 tokens; with `a_B`, `b_BxM`, `b_B` as `levenshtein` has them.
    a_B: their number.
    b_BxM: the others.
    b_B: their number.
    bound: z0 as a share of the longer one's length. The paper gives no z0; a
      number of tokens would mean another thing at every length.
  """
  distance_B = levenshtein(a_BxL, a_B, b_BxM, b_B)
  longest_B = jnp.maximum(jnp.maximum(a_B, b_B), 1)  # two empty ones agree
  share_B = distance_B / longest_B
  return jnp.where(share_B <= bound, 1.0 - share_B, 0.0)


def agreement(teacher_BxLxV, tokens_BxL, mask_BxL):
  """Share of tokens that are the frozen teacher's own first choice, `[B]`.

  The default for `r_sem`. The paper asks a reward model whether two texts mean
  the same (0 or 1); this asks the teacher how far it would have said what the
  student said, and costs nothing, as the teacher scores it for the divergence
  anyway.

  Args:
    teacher_BxLxV: logits for the places of `tokens_BxL`, each read after the
      tokens before it.
    tokens_BxL: what the student said.
    mask_BxL: which of them count.
  """
  same_BxL = (teacher_BxLxV.argmax(-1) == tokens_BxL) & mask_BxL
  return same_BxL.sum(1) / jnp.maximum(mask_BxL.sum(1), 1)


def combine(sem_B, abs_B, gamma: float):
  """`gamma r_sem + (1 - gamma) r_abs`."""
  return gamma * sem_B + (1 - gamma) * abs_B
