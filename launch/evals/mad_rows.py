"""Rows of MAD's six tasks and their score; `mad` says what they are."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from nestax.launch.evals import problems

MAP_SEED = 12345  # of the one map of memorization


class Size(NamedTuple):
  """What varies: ids, tokens, rows to train on, and what single tasks have."""

  V: int = 16
  L: int = 128
  rows: int = 12_800
  noise: int = 0  # ids that are noise
  share: float = 0.0  # of pairs that are noise
  copied: int = 0  # ids to copy


def compression(size: Size, rng, rows: int, train: bool) -> problems.Batch:
  """Random ids and a last token out of which to recover them and itself."""
  del train
  tokens = rng.integers(0, size.V - 1, (rows, size.L))
  tokens[:, -1] = size.V - 1
  return _batch(tokens, tokens)


def recall(size: Size, rng, rows: int, train: bool) -> problems.Batch:
  """Key, value, key, value, ...; the last key is one that was there."""
  ids, pairs = size.V - size.noise, size.L // 2
  keys, values = ids // 2, ids - ids // 2
  value_of = keys + rng.integers(0, values, (rows, keys))
  every = np.arange(rows)
  tokens = np.zeros((rows, pairs, 2), np.int64)
  told = np.zeros(
    (rows, pairs), bool
  )  # whether a pair's value is known by then
  seen = np.zeros((rows, keys), bool)
  certain = rng.integers(0, pairs - 1, rows)  # one pair that is not noise
  for i in range(pairs - 1):
    key = rng.integers(0, keys, rows)
    noisy = (rng.random(rows) < size.share) & (i != certain)
    told[:, i] = seen[every, key] & ~noisy
    seen[every[~noisy], key[~noisy]] = True
    pair = np.stack([key, value_of[every, key]], 1)
    if size.noise:
      noise = ids + rng.integers(0, size.noise, (rows, 2))
      pair = np.where(noisy[:, None], noise, pair)
    tokens[:, i] = pair
  # of the keys there were any, each as likely
  last = np.where(seen, rng.random((rows, keys)), -1.0).argmax(1)
  tokens[:, -1] = np.stack([last, value_of[every, last]], 1)
  told[:, -1] = True
  weights = np.stack([np.zeros_like(told), told], 2).reshape(rows, -1)
  return _next(tokens.reshape(rows, -1), weights, train)


def fuzzy(size: Size, rng, rows: int, train: bool) -> problems.Batch:
  """Pairs of runs of ids, one of them at the end, padded on the left."""
  made = [_fuzzy_row(size, rng, train) for _ in range(rows)]
  tokens, told = (np.stack(x) for x in zip(*made))
  return _next(tokens, told, train)


MOTIF = 3  # most ids of a fuzzy key or value


def _fuzzy_row(size: Size, rng, train: bool):
  """One row of L + 1 tokens, and which of them are known by then.

  As in the benchmark the pair that is asked for at the end is put in where its
  turn comes; in rare rows the row is full before, and it was never shown.
  """
  ids = size.V - 1  # the last one pads
  keys = ids // 2
  most = size.L // 2 + 2  # pairs, of at least two ids
  drawn_keys = _motifs(rng, 0, keys, 1 if train else MOTIF, most)
  drawn_values = _motifs(rng, keys, ids, 1, most)
  probe, answer = next(drawn_keys), next(drawn_values)
  asked = len(probe) + len(answer)
  place = int(rng.integers(0, size.L - 2 * asked))
  value_of, shown, shown_probe = {}, set(), False
  tokens, told = [], []
  while len(tokens) < size.L - asked - 2 * MOTIF:
    forced = len(tokens) >= place and not shown_probe
    key = probe if forced else next(drawn_keys)
    if key == probe:
      value, shown_probe = answer, True
    else:
      value = value_of.setdefault(key, next(drawn_values))
    tokens += [*key, *value]
    known = key in shown and not forced
    told += [False] * len(key) + [known] * len(value)
    shown.add(key)
  tokens += [*probe, *answer]
  told += [False] * len(probe) + [True] * len(answer)
  missing = size.L + 1 - len(tokens)
  tokens = np.array([ids] * missing + tokens)
  return tokens, np.array([False] * missing + told)


def _motifs(rng, low: int, high: int, least: int, many: int):
  """Runs of `least` to MOTIF different ids below `high`, as tuples."""
  ids = low + rng.random((many, high - low)).argsort(1)[:, :MOTIF]
  lengths = rng.integers(least, MOTIF + 1, many)
  runs = zip(ids.tolist(), lengths.tolist())
  return (tuple(run[:length]) for run, length in runs)


def copying(size: Size, rng, rows: int, train: bool) -> problems.Batch:
  """Ids among blanks, a sign to copy them, and blanks to answer at."""
  del train
  many, blank = size.copied, size.V - 2
  ids = rng.integers(0, size.V - 2, (rows, many))
  blanks = size.L - 2 * many - 1
  before = rng.multinomial(blanks, [1 / many] * many, rows)
  place = before.cumsum(1) + np.arange(many)
  tokens = np.full((rows, size.L), blank)
  np.put_along_axis(tokens, place, ids, 1)
  tokens[:, -many - 1] = size.V - 1
  targets = np.zeros_like(tokens)
  targets[:, -many:] = ids
  weights = np.zeros(tokens.shape)
  weights[:, -many:] = 1
  return _batch(tokens, targets, weights)


def memorization(size: Size, rng, rows: int, train: bool) -> problems.Batch:
  """Keys, each followed by a sign at which to say its value."""
  del train
  keys = (size.V - 1) // 2
  fixed = np.random.default_rng(MAP_SEED)
  value_of = keys + fixed.permutation(size.V - 1 - keys)[:keys]
  key = rng.integers(0, keys, (rows, size.L // 2))
  sign = np.full_like(key, size.V - 1)
  tokens = np.stack([key, sign], 2).reshape(rows, -1)
  targets = np.stack([key, value_of[key]], 2).reshape(rows, -1)
  weights = np.zeros(tokens.shape)
  weights[:, 1::2] = 1
  return _batch(tokens, targets, weights)


TASKS = {
  'compression': compression,
  'in-context recall': recall,
  'fuzzy in-context recall': fuzzy,
  'noisy in-context recall': recall,
  'selective copying': copying,
  'memorization': memorization,
}


def _batch(tokens, targets, weights=None) -> problems.Batch:
  weights = np.ones(tokens.shape) if weights is None else weights
  return {
    'tokens': tokens.astype(np.int32),
    'targets': targets.astype(np.int32),
    'weights': weights.astype(np.float32),
  }


def _next(tokens, told, train: bool) -> problems.Batch:
  """All next tokens to train on, to test those that are known."""
  weights = np.ones(told.shape) if train else told
  return _batch(tokens[:, :-1], tokens[:, 1:], weights[:, 1:])


def by_id(logits_BxLxV, batch):
  """The batch's mean over ids of the share of their targets that was right.

  Returns:
    That, times the batch's rows, and the rows.
  """
  V = logits_BxLxV.shape[-1]
  weights_BxL = (batch['weights'] > 0).astype(jnp.float32)
  said_BxL, wanted_BxL = logits_BxLxV.argmax(-1), batch['targets']
  zeros_V = jnp.zeros(V, jnp.float32)
  wanted_V = zeros_V.at[wanted_BxL].add(weights_BxL)
  said_V = zeros_V.at[said_BxL].add(weights_BxL)
  right_BxL = (said_BxL == wanted_BxL) * weights_BxL
  right_V = zeros_V.at[wanted_BxL].add(right_BxL)
  counts_V = wanted_V + said_V > 0
  shares_V = right_V / jnp.maximum(wanted_V, 1.0)
  mean = shares_V.sum() / jnp.maximum(counts_V.sum(), 1)
  rows = (weights_BxL.sum(1) > 0).sum().astype(jnp.float32)
  return mean * rows, rows
