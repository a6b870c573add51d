"""One step of a night: what a slot is taught, by its teacher or by dreams."""

import jax
import jax.numpy as jnp
import numpy as np

from nestax.cms.experts import SlotsError
from nestax.sleep import grow, rounds, seed, texts
from nestax.sleep.objective import Side
from nestax.sleep.texts import Day
from nestax.sleep.tools import Tools


class MergeError(SlotsError):
  """A merge would lose too much: `lost`, a share of what the slots say."""

  def __init__(self, words: str, lost: float):
    super().__init__(words)
    self.lost = lost


def move(
  tools: Tools, teacher, student, k: int, day: Day, made, kept, key, tell
):
  """Moves what the levels k hold into a slot: (params, its index, numbers)."""
  cfg, how = tools.cfg, tools.how
  to = grow.receiver(cfg, k)
  room_key, free_key, key = jax.random.split(jax.random.fold_in(key, k), 3)
  params, index, lost = _room(tools, student.params, to, day, room_key)
  if to != k:
    params = grow.free(cfg, params, k, free_key)
  # a model of one level reads as one without any; of more, each pair's program
  # is that of the others if levels that were reset are zeros
  blank = len(cfg.groups) == 1
  numbers = {} if lost is None else {f'lost_{to}': lost}

  def note(step, parts):
    if step == 1:
      numbers.update({f'{n}_{k}_first': float(x) for n, x in parts.items()})
    if tell:
      tell(k, step, parts)

  new, last = seed.run(
    how.seed,
    tools.seeds[to],
    teacher,
    Side(
      (params, jnp.asarray(to), jnp.asarray(index)),
      None if blank else _filled(student.context, teacher.context),
    ),
    grow.take(cfg, params, to, index),
    texts.drawer(made, len(day.rows), how.seed.rows),
    key,
    note,
    # as many rows of every owner, whoever's context the student still has
    kept and texts.drawer(kept, 1, how.seed.rows * len(day.rows)),
  )
  numbers |= {f'{name}_{k}': float(x) for name, x in last.items()}
  return grow.put(cfg, params, to, index, new), index, numbers


def dream_on(tools: Tools, params, k: int, index: int, tasks, key):
  """Goes on with slot `index` of the levels k in dreams: (params, numbers)."""
  cfg, how = tools.cfg, tools.how.dream
  trained, tried, after = rounds.run(
    how,
    tools.dreams[k],
    (params, jnp.asarray(k), jnp.asarray(index)),
    None,
    grow.take(cfg, params, k, index),
    tasks,
    jax.random.fold_in(key, len(cfg.groups)),  # no sender's key
  )
  first = tried[0]
  results = [result for results in tried for result in results]
  numbers = {
    'dream_before': np.mean([result.before for result in first]),
    'dream_best': np.mean([result.scores.max() for result in first]),
    'dream_paid': np.mean([result.rewards for result in results]),
    'dream_after': np.mean(after),
  }
  params = grow.put(cfg, params, k, index, trained)
  return params, {name: float(value) for name, value in numbers.items()}


def reset(context, k: int):
  """The context without level k; None stands for a level that is reset."""
  return (*context[:k], None, *context[k + 1 :])


def _filled(context, like):
  """The context with zeros for the levels that are reset."""
  return tuple(
    jax.tree.map(jnp.zeros_like, old) if tree is None else tree
    for tree, old in zip(context, like)
  )


def _room(tools: Tools, params, k: int, day: Day, key):
  """A free slot of the levels k: (params, its index, what a merge lost)."""
  cfg, how = tools.cfg, tools.how
  try:
    return *grow.grow(cfg, params, k), None
  except SlotsError:
    if how.full == 'error':
      raise
  tokens, _, length = texts.joined(day.read)
  if len(tokens) == 1:  # one half to fit on, the other to see what is lost
    half = int(length[0]) // 2
    tokens, length = tokens[:, : 2 * half].reshape(2, half), np.full(2, half)
  params, error = grow.merge(
    cfg, params, k, jnp.asarray(tokens), key, length_B=length
  )
  if not error <= how.lost:
    raise MergeError(
      f'levels of period {grow.period(cfg, k)}: all slots are used up, and '
      f'merging them into the MLP would lose {float(error):.1%} of what they '
      f'say, more than lost={how.lost:g}',
      float(error),
    )
  return *grow.grow(cfg, params, k), float(error)
