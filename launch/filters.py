"""What of a day is slept on; the rest never reaches the slow weights.

Pieces of what was read are left out by what they cost when they were read, by
what they cost the slow levels alone, or by predicates of a program's own.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from nestax.launch.plans import Plan
from nestax.models.model_state import ModelState
from nestax.sleep import gate, owners, replay
from nestax.sleep.replay import Piece, Predicate


def any_of(plan: Plan) -> bool:
  """Whether a night leaves anything out."""
  bounds = plan.options.surprise, plan.options.disagreement
  return bool(plan.keep) or min(bounds) < math.inf


def of_plan(
  plan: Plan,
  params,
  state: ModelState,
  names: Sequence[str],
  pieces: Sequence[Piece],
) -> list[Predicate]:
  """The filters of a night.

  Args:
    plan: gives the bounds, and predicates of its own.
    params: slow weights.
    state: of the owners, who may have slots of their own.
    names: the owners, in the order of the batch.
    pieces: all that may be slept on.
  """
  options, found = plan.options, list(plan.keep)
  if options.surprise < math.inf:
    found.append(replay.surprising(options.surprise))
  if options.disagreement < math.inf:
    score = functools.partial(disagreement, plan, params, state, names)
    found.append(replay.agreeing(score, list(pieces), options.disagreement))
  return found


def disagreement(
  plan: Plan, params, state: ModelState, names: Sequence[str], pieces
) -> np.ndarray:
  """What each piece costs by the slow weights alone, nats a token.

  Those of its owner, where owners have slots of their own. The first token of
  every `texts.length` of a piece is not scored; a piece of one costs nothing.
  """
  length, pad = plan.options.night.texts.length, plan.tools.words.pad
  costs = np.zeros(len(pieces))
  for row, name in enumerate(names):
    mine = [i for i, piece in enumerate(pieces) if piece.owner == name]
    if not mine:
      continue
    own = owners.personal(params, state, row)
    tokens, size, origin = replay.batch([pieces[i] for i in mine], length, pad)
    nats, counts = gate.row_nats(plan.tools.reader, own, None, tokens, size)
    nats, counts = (np.bincount(origin, x, len(mine)) for x in (nats, counts))
    costs[mine] = nats / np.maximum(counts, 1)
  return costs
