"""What a life knows of its questions, before and after a night, per level.

At dusk questions are put to the levels as they are, to the slow weights alone
(all levels reset), and to each level alone (the others reset). In the morning
they are put to the slow weights alone, and to those with the expert slots of a
level switched off, which tells whose slots carry what is known.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch import recall
from nestax.launch.data.tokenizers import Tokenizer
from nestax.launch.questions import Question
from nestax.models.config import ModelConfig
from nestax.models.model_state import ModelState
from nestax.sleep import grow, owners
from nestax.sleep import reader as readers
from nestax.sleep.reader import Reader
from nestax.sleep.replay import Piece

AT_ONCE = 2048  # tokens a call at most
MARK = 'day '  # and the day's name: the mark of a piece of what was read

About = Collection[tuple[str, str]]  # owners and days, what is slept on


class Part(NamedTuple):
  """Questions of one day that one owner is asked."""

  owner: str
  day: str
  sheet: recall.Sheet


class Shares(NamedTuple):
  """Shares of right answers, by day; days that were not asked are missing."""

  right: dict[str, float]
  slept: float | None  # over the questions about what is slept on


class Who(NamedTuple):
  """Whom to ask: a model, with what its owners' levels have written.

  Attributes:
    cfg, reader: of the model.
    params: its slow weights.
    state: of the owners, who may have slots of their own.
    names: the owners, in the order of the batch; '' for who is not there.
    tell: called when questions of a day have been asked, with how many.
  """

  cfg: ModelConfig
  reader: Reader
  params: Any
  state: ModelState
  names: Sequence[str]
  tell: Callable[[int], None] = lambda count: None


def parts(tokenizer: Tokenizer, asked: Sequence[Question]) -> tuple[Part, ...]:
  """Questions as rows of one length, those of an owner and day together."""
  groups: dict[tuple[str, str], list] = {}
  for one in asked:
    put = one.prompt, one.answers
    groups.setdefault((one.owner, one.day), []).append(put)
  sheets = {of: recall.ask(tokenizer, group) for of, group in groups.items()}
  length = max(sheet.length for sheet in sheets.values())
  return tuple(
    Part(*of, sheet.filled(length, tokenizer.pad))
    for of, sheet in sheets.items()
  )


def dusk(who: Who, quiz: Sequence[Part], about: About) -> dict[str, Any]:
  """What is known before a night.

  Args:
    who: the model at dusk, nothing pending in its levels.
    quiz: what to ask.
    about: what is slept on.

  Returns:
    Shares: `slow`, of the slow weights alone; `dusk`, of the levels as they
    are; `alone`, a list, of each level alone.
  """
  P = len(who.cfg.groups)
  found = {
    'slow': _shares(who, quiz, about, range(P)),
    'dusk': _shares(who, quiz, about),
  }
  if P == 1:
    return found | {'alone': [found['dusk']]}
  others = [[k for k in range(P) if k != one] for one in range(P)]
  return found | {'alone': [_shares(who, quiz, about, x) for x in others]}


def morning(who: Who, quiz: Sequence[Part], about: About = frozenset()):
  """What is known by the slow weights alone, as `Shares`."""
  return _shares(who, quiz, about, range(len(who.cfg.groups)))


def without(who: Who, quiz: Sequence[Part], about: About, used: Sequence[int]):
  """`morning` with one level's slots switched off, a list by level.

  None for a level that uses none of them, as `used` says.
  """
  levels = range(len(used))
  return [
    _shares(who, quiz, about, levels, k) if used[k] else None for k in levels
  ]


def dusk_asks(P: int) -> int:
  """How often `dusk` puts each question to a model of P periods."""
  return 2 + (P if P > 1 else 0)


def _shares(who: Who, quiz, about: About, reset=(), silent=None) -> Shares:
  """Asks; with levels reset, and one level's slots switched off."""
  right: dict[str, list] = {}
  fresh = []
  for part in quiz:
    if part.owner not in who.names:
      continue
    row = who.names.index(part.owner)
    params = owners.personal(who.params, who.state, row)
    if silent is not None:
      params = grow.silenced(who.cfg, params, silent)
    context = jax.tree.map(
      lambda x, row=row: x[:, row : row + 1], readers.learned(who.state)
    )
    for k in reset:  # zeros, so that all that is asked is one program
      context = _zeros(context, k)
    rows = max(1, min(64, AT_ONCE // part.sheet.length))
    known = recall.right(who.reader, params, context, part.sheet, rows)
    right.setdefault(part.day, []).append(known)
    if (part.owner, part.day) in about:
      fresh.append(known)
    who.tell(part.sheet.count)
  whole = float(np.concatenate(fresh).mean()) if fresh else None
  means = {day: float(np.concatenate(x).mean()) for day, x in right.items()}
  return Shares(means, whole)


def _zeros(context, k: int):
  zeros = jax.tree.map(jnp.zeros_like, context[k])
  return (*context[:k], zeros, *context[k + 1 :])


def count(quiz: Sequence[Part]) -> int:
  """Questions."""
  return sum(part.sheet.count for part in quiz)


def chance(quiz: Sequence[Part], about: About) -> tuple[float | None, int]:
  """(share that somebody who knows nothing has right, how many are asked)."""
  some = [x for x in quiz if (x.owner, x.day) in about]
  right = sum(x.sheet.chance * x.sheet.count for x in some)
  return (right / count(some) if some else None), count(some)


def numbers(found: Mapping[str, Any], quiz, about: About) -> dict[str, float]:
  """Metrics of a night: of the questions about what was slept on."""
  by_chance, many = chance(quiz, about)
  if not many:
    return {}
  of = {
    'asked': many,
    'chance': by_chance,
    'slow': found['slow'].slept,
    'dusk': found['dusk'].slept,
    'morning': found['morning'].slept,
  }
  for name in ('alone', 'without'):
    for k, shares in enumerate(found[name]):
      of[f'{name}_{k}'] = shares and shares.slept
  return {f'recall_{k}': float(v) for k, v in of.items() if v is not None}


def about(pieces: Iterable[Piece]) -> set:
  """Owners and days of pieces of what was read."""
  return {day_of(piece) for piece in pieces}


def day_of(piece: Piece) -> tuple[str, str]:
  """Owner and day of a piece of what was read."""
  return piece.owner, piece.mark.removeprefix(MARK)


def row(found: Mapping[str, Any], quiz: Sequence[Part]) -> dict:
  """What a life keeps of it: shares by day, lists by level, plain values."""
  days = dict.fromkeys(part.day for part in quiz)
  about = {day: {(x.owner, day) for x in quiz if x.day == day} for day in days}
  chances = {day: chance(quiz, pairs) for day, pairs in about.items()}

  def plain(value):
    if isinstance(value, list):
      return [plain(x) for x in value]
    return value and value.right

  return {
    'asked': {day: many for day, (_, many) in chances.items()},
    'chance': {day: x for day, (x, _) in chances.items()},
  } | {name: plain(value) for name, value in found.items()}
