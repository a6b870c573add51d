"""What a night is learned from: texts that teachers have read, or say."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.sleep import reader as readers
from nestax.sleep import replay
from nestax.sleep.reader import Reader, Said


class NothingRead(ValueError):
  """There is nothing to sleep on."""


@dataclasses.dataclass(frozen=True)
class TextsConfig:
  """The texts of a night, of each sequence.

  Attributes:
    length: tokens of a text, at most.
    read: texts that are what it read. (The paper's nights have none of them:
      all is said by the teacher.)
    continued: texts that it says, going on from prefixes of what it read.
    free: texts that it says from the beginning-of-text token.
    kept: texts that the slow weights say from there, as they were before the
      day: what is to stay as it is (see `keep` of `objective.SeedConfig`). They
      are no texts of a sequence; all of them share these.
    temperature: of what it says.
  """

  length: int = 64
  read: int = 16
  continued: int = 8
  free: int = 8
  kept: int = 64
  temperature: float = 1.0

  def __post_init__(self):
    if self.length < 2:
      raise ValueError(f'length={self.length}: at least 2')
    kinds = self.read, self.continued, self.free
    if self.kept < 0:
      raise ValueError(f'kept={self.kept}: 0 or more')
    if min(kinds) < 0 or not sum(kinds):
      raise ValueError(
        f'read, continued, free={kinds}: 0 or more each, and one text at least'
      )
    if not 0 < self.temperature < float('inf'):
      raise ValueError(f'temperature={self.temperature}: above 0 and finite')

  @property
  def each(self) -> int:
    """Texts of a sequence in a night."""
    return self.read + self.continued + self.free


class Words(NamedTuple):
  """The ids that mean something to a night."""

  bos: int
  eos: int  # -1 if no text ends
  pad: int
  allowed_V: np.ndarray | None = None  # bool, ids that may be said


class Day(NamedTuple):
  """What O owners bring to a night."""

  rows: tuple[int, ...]  # of the state
  names: tuple[str, ...]
  read: tuple[Said, ...]  # each owner's pieces as texts, numpy


def gather(
  cfg: TextsConfig,
  pad: int,
  names: Sequence[str],
  buffer: replay.Replay,
  keep: Sequence[replay.Predicate] = (),
  only: Sequence[str] | None = None,
) -> Day:
  """Picks whose day is consolidated, and what of it.

  An owner of whom the filters leave nothing is not picked: what such a
  sequence has learned stays in its fast levels.

  Args:
    cfg: gives the length of a text.
    pad: id of what is after a text.
    names: owner of each sequence of the state.
    buffer: what they read.
    keep: filters of pieces.
    only: owners that the night is limited to; None for all.

  Raises:
    NothingRead: if nothing is left.
  """
  rows, read = [], []
  for row, name in enumerate(names):
    if name not in buffer.owners or (only is not None and name not in only):
      continue
    pieces = list(replay.consolidated(buffer.pieces([name]), *keep))
    if not pieces:
      continue
    tokens, count, _ = replay.batch(pieces, cfg.length, pad)
    tokens, count = tokens[count > 1], count[count > 1]
    if len(tokens):
      rows.append(row)
      read.append(Said(tokens, np.ones_like(count), count))
  if not rows:
    raise NothingRead(
      'nothing to consolidate: no sequence has read anything that the filters '
      'let through'
    )
  return Day(tuple(rows), tuple(names[row] for row in rows), tuple(read))


def speaker(cfg: TextsConfig, reader: Reader, words: Words) -> Callable:
  """Makes the program `(params, context, prompts, key) -> Said`."""

  @jax.jit
  def speak(params, context, prompts: Said, key) -> Said:
    return readers.sample(
      reader,
      params,
      context,
      prompts,
      key,
      cfg.temperature,
      words.eos,
      words.pad,
    )

  return speak


def make(cfg: TextsConfig, bos: int, speak: Callable, day: Day, key) -> Said:
  """Makes a night's texts, owner by owner, `cfg.each` of each.

  Args:
    cfg: how many of what kind.
    bos: id that begins a text.
    speak: `(prompts, key) -> Said`: the teachers go on.
    day: what was read.
    key: of all that is random.
  """
  O, L = len(day.rows), cfg.length  # noqa: E741
  pick_key, key = jax.random.split(key)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(pick_key)))
  parts = [_pick(rng, day, cfg.read)] if cfg.read else []
  said = cfg.continued + cfg.free
  if said:
    prompts = _pick(rng, day, said)
    start = rng.integers(1, np.maximum(prompts.length_B, 2)).reshape(O, said)
    tokens = prompts.tokens_BxL.reshape(O, said, L).copy()
    start[:, cfg.continued :] = 1
    tokens[:, cfg.continued :, 0] = bos
    start = jnp.asarray(start.reshape(-1), jnp.int32)
    prompts = Said(jnp.asarray(tokens.reshape(-1, L)), start, start)
    parts.append(speak(prompts, key))

  def side_by_side(*xs):
    xs = [jnp.asarray(x).reshape(O, -1, *x.shape[1:]) for x in xs]
    x = jnp.concatenate(xs, 1)
    return x.reshape(-1, *x.shape[2:])

  return Said(*(side_by_side(*x) for x in zip(*parts)))


def kept(
  cfg: TextsConfig, bos: int, speak: Callable, key, past: Said | None = None
) -> Said | None:
  """Makes the texts that a night is to leave as they are; None for none.

  Args:
    cfg: how many.
    bos: id that begins a text.
    speak: `(prompts, key) -> Said`: the slow weights alone go on.
    key: of all that is random.
    past: texts of earlier days, rows of the same length, that are kept too.
  """
  parts = []
  if cfg.kept:
    one_B = jnp.ones((cfg.kept,), jnp.int32)
    tokens_BxL = jnp.full((cfg.kept, cfg.length), bos, jnp.int32)
    parts.append(speak(Said(tokens_BxL, one_B, one_B), key))
  if past is not None:
    parts.append(Said(*map(jnp.asarray, past)))
  if not parts:
    return None
  return Said(*(jnp.concatenate(x) for x in zip(*parts)))


def _pick(rng, day: Day, n: int) -> Said:
  return joined([some(rng, read, n) for read in day.read])


def some(rng: np.random.Generator, said: Said, count: int) -> Said:
  """Draws rows, none of them again before all were taken; none of none."""
  total = len(said.length_B)
  rounds = -(-count // total) if total else 0
  index = [rng.permutation(total) for _ in range(rounds)]
  index = np.concatenate([np.zeros(0, int), *index])[:count]
  return Said(*(x[index] for x in said))


def earlier(days: Sequence[Said], count: int, rng) -> list[Said]:
  """Draws `count` rows of earlier days, of all of them alike."""
  shares = [
    count * (i + 1) // len(days) - count * i // len(days)
    for i in range(len(days))
  ]
  return [some(rng, *each) for each in zip(days, shares)]


def joined(parts: Iterable[Said | None]) -> Said | None:
  """All rows as one batch, numpy; None if there are none."""
  parts = [part for part in parts if part is not None and len(part.length_B)]
  if not parts:
    return None
  return Said(*(np.concatenate(x) for x in zip(*parts)))


def drawer(texts: Said, O: int, rows: int) -> Callable:  # noqa: E741
  """Makes `key -> Said`: `rows` of each of O owners' texts, drawn.

  The texts are owner by owner; with O of 1, of whoever there is.
  """
  return lambda key: _draw(key, texts, O, rows)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(key, texts: Said, O: int, rows: int) -> Said:  # noqa: E741
  each = texts.length_B.shape[0] // O
  index = jax.random.randint(key, (O, rows), 0, each)
  index = (index + each * jnp.arange(O)[:, None]).reshape(-1)
  return Said(*(x[index] for x in texts))
