"""Rows of needles in haystacks, several questions in one, and their scores."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from nestax.launch.evals import haystack, problems

DRAWN = 64  # questions of a kind, to see what they take


def batch_of(rows: Sequence[Sequence[haystack.Row]], L: int, background: float):
  """Rows of L - 1 tokens and their next ones; `span` says what is an answer.

  Args:
    rows: of each the questions in it, at most L tokens together.
    L: tokens, the last of which is only a target.
    background: weight of what is no answer; 0 to score.
  """
  shape = len(rows), L
  tokens, span = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  weights = np.zeros(shape, np.float32)
  for i, parts in enumerate(rows):
    start = 0
    for part in parts:
      stop = start + len(part.tokens)
      tokens[i, start:stop] = part.tokens
      span[i, start:stop] = part.span
      weights[i, start:stop] = background
      weights[i, start + part.answer : stop] = 1.0
      start = stop
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': weights[:, 1:],
    'span': span[:, 1:],
  }


def mixture(
  hay: haystack.Haystack,
  L: int,
  background: float,
  shortest: int = 0,
  every: bool = True,
) -> problems.Draw:
  """Rows to train on: any kind, any length that has room for it up to L.

  Args:
    hay: what needles are hidden in.
    L: tokens of a row.
    background: weight of tokens that are no answer.
    shortest: tokens of the shortest questions, see `needle.Options`.
    every: L has to have room for every kind; False: the others are left out.

  Raises:
    ValueError: if there is no room; of `every` kind when rows are drawn.
  """
  lengths = [L]
  while shortest and lengths[-1] // 2 >= shortest:
    lengths.append(lengths[-1] // 2)
  sizes = _sizes(hay)
  if min(sizes.values()) > lengths[-1]:
    raise ValueError(
      f'shortest={shortest}, rows of {L} tokens: {lengths[-1]} have no room '
      f'for a question of any kind; the shortest take {min(sizes.values())}: '
      f'give {hay.more}'
    )

  def one(most, rng):
    while True:
      every_one = every and most == L
      kinds = [k for k, size in sizes.items() if every_one or size <= most]
      kind = kinds[rng.integers(len(kinds))]
      least = min(max(most // 4, sizes[kind]), most)
      for length in (int(rng.integers(least, most + 1)), most):
        try:
          return haystack.row(hay, kind, length, rng)
        except ValueError:  # of longer words than `sizes` has seen
          if every_one and length == most:
            raise

  def filled(rng):
    room, parts = L, []
    for most in lengths[rng.integers(len(lengths)) :]:
      while room >= most:
        parts.append(one(most, rng))
        room -= len(parts[-1].tokens)
    return parts

  def draw(rng: np.random.Generator, rows: int) -> problems.Batch:
    return batch_of([filled(rng) for _ in range(rows)], L, background)

  return draw


def _sizes(hay: haystack.Haystack) -> dict[haystack.Kind, int]:
  """Tokens that hardly any question of a kind exceeds, without a haystack."""
  rng = np.random.default_rng(0)
  return {
    kind: max(haystack.taken(hay, kind, rng) for _ in range(DRAWN))
    for kind in haystack.KINDS.values()
  }


def check_room(hay: haystack.Haystack, options: dict[str, list[int]]) -> None:
  """Refuses rows that some question of some kind does not fit into.

  Args:
    hay: as what needles are hidden in; its text does not matter.
    options: by an option's name the tokens of rows that it asks for.

  Raises:
    ValueError: naming the option, the kinds and what is enough.
  """
  most = haystack.most(hay)
  for name, lengths in options.items():
    short = [L for L in lengths if L < max(most.values())]
    if short:
      lacking = [f'{k} {n}' for k, n in most.items() if n > short[0]]
      raise ValueError(
        f'needle.{name}={",".join(map(str, lengths))}: rows of {short[0]} '
        'tokens have no room for every kind: question, needles and answer '
        f'alone take up to {", ".join(lacking)}; give at least '
        f'{_enough(hay, max(most.values()))}'
      )


def _enough(hay: haystack.Haystack, most: int) -> str:
  if hay.prompt == 'short':
    return f'{most}'
  least = max(haystack.most(dataclasses.replace(hay, prompt='short')).values())
  return f'{most}, or {least} with --set=needle.prompt=short'


def values_said(logits_BxLxV, batch):
  """Of every row the share of its values that are said whole."""
  return shares(logits_BxLxV.argmax(-1) == batch['targets'], batch['span'])


def shares(right_BxL, span_BxL):
  """The sum over rows of the share of values said, and the rows that ask."""
  said_B = there_B = 0.0
  for number in range(1, haystack.MOST + 1):
    inside_BxL = span_BxL == number
    asked_B = inside_BxL.any(1)
    there_B += asked_B.astype(jnp.float32)
    said_B += ((right_BxL | ~inside_BxL).all(1) & asked_B).astype(jnp.float32)
  shares_B = said_B / jnp.maximum(there_B, 1.0)
  return shares_B.sum(), (there_B > 0).sum().astype(jnp.float32)
