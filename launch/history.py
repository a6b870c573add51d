"""What there was: every night a version, and a row; days not to be changed."""

import dataclasses
import math
import pathlib

import numpy as np

from nestax.launch import by_level, days, report
from nestax.launch.life import Being, Past
from nestax.launch.plans import Plan, rows_of
from nestax.sleep import cycle, gate, owners
from nestax.sleep import lineage as lineage_
from nestax.sleep.lineage import Lineage, Version


def remember(
  plan: Plan, past: Past, slept: cycle.Night, recall: dict | None = None
) -> None:
  """Makes a night history; the checkpoint that comes next holds it.

  The first one remembered is night 0, the model that never slept. `recall` is
  what `quiz.row` says of it, if there are questions.
  """
  number, cfg = len(past.versions), plan.made.model.cfg
  accepted = [v['version'] for v in past.versions if v['accepted']]
  version = lineage_.version_of(
    number,
    accepted[-1] if accepted else -1,
    plan.options.night,
    slept,
    f'checkpoints/{past.step + 1}',
  )
  # a version is told apart by what its nights were kept from, too
  version = dataclasses.replace(
    version, config=version.config | {'life': _life(plan)}
  )
  after = past.day if past.done or not past.day else past.day - 1
  row = report.night_row(
    number,
    slept,
    plan.days[after].name if number else '',
    retention(plan, past, slept.params, slept.state),
    owners.used(cfg, slept.params, slept.state),
    cfg.cms.slots,
    recall,
  )
  past.versions.append(dataclasses.asdict(lineage_.stamped(version)))
  past.rows.append(row)
  past.nights, past.since, past.dusk = number, 0, False


def _life(plan: Plan) -> dict:
  """What a night's own config does not say of what it was slept on."""
  options = plan.options

  def finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None

  return {
    'surprise': finite(options.surprise),
    'disagreement': finite(options.disagreement),
    'predicates': len(plan.keep),
    'owners': list(plan.only),
    'capacity': options.capacity,
    'rehearsed': 0 if plan.rehearsed is None else options.rehearsed,
    'earlier': options.earlier,
    'readings': options.readings,
    'seed': options.seed,
  }


def never_slept(plan: Plan, being: Being, names) -> cycle.Night:
  """Night 0, with the core loss of the model as it was loaded."""
  core = plan.core
  loss = gate.loss(
    plan.tools.reader, being.params, None, core.tokens_BxL, core.length_B
  )
  decision = gate.Decision(True, 'never slept')
  return cycle.Night(
    being.params, being.state, decision, tuple(names), {'core_after': loss}, {}
  )


def retention(plan: Plan, past: Past, params, state) -> dict[str, float | None]:
  """Nats a token of each day's text by the slow weights alone.

  Those of its owner, where owners have slots of their own.
  """
  length = plan.options.night.texts.length
  shared, losses = state.owned is None, {}
  for day in plan.days:
    rows = {
      name: rows_of(ids, length, plan.options.probe_rows, plan.tools.words.pad)
      for name, ids in day.tokens.items()
      if name in past.present and len(ids) > 1
    }
    groups = [list(rows)] if shared else [[name] for name in rows]
    nats = count = 0
    for names in filter(None, groups):
      tokens = np.concatenate([rows[name].tokens_BxL for name in names])
      size = np.concatenate([rows[name].length_B for name in names])
      own = owners.personal(params, state, past.owners.index(names[0]))
      loss = gate.loss(plan.tools.reader, own, None, tokens, size)
      scored = int((size - 1).sum())
      nats, count = nats + loss * scored, count + scored
    losses[day.name] = nats / count if count else None
  return losses


def write(out: pathlib.Path, plan: Plan, past: Past) -> None:
  """Brings the files of a life in step with its checkpoint."""
  periods = plan.made.model.cfg.stream.periods
  versions = [
    Version(**kept | {'metrics': by_level.split(kept['metrics'], periods)})
    for kept in past.versions
  ]
  Lineage(out / 'lineage.jsonl').rewrite(versions)
  names = [day.name for day in plan.days]
  report.write(out, past.rows, names, periods)


def name_days(past: Past, read) -> None:
  """Names the days of `retention`, of which older lives kept the order."""
  names = [day.name for day in read]
  for row in past.rows:
    if isinstance(row['retention'], list):
      row['retention'] = dict(zip(names, row['retention']))


def nothing_left(past: Past, count: int) -> str:
  """What to say of a life that has read all its `count` days."""
  if past.replay.owners:
    return (
      f'nothing to do: days read: {count} of {count}, nights slept: '
      f'{past.nights}; --nights={past.nights + 1} sleeps on what is left, and '
      'another day with --text goes on'
    )
  return (
    f'nothing to do: days slept on: {count} of {count}; another day with '
    '--text, after those, goes on'
  )


def check_days(past: Past, read, out) -> None:
  """Refuses texts that are not those that a life has read.

  Raises:
    ValueError: naming the day or the owner.
  """
  if len(read) < len(past.marks):
    raise ValueError(
      f'{out}: {len(past.marks)} days were begun, and the texts given are '
      f'{len(read)}'
    )
  for number, (day, marks) in enumerate(zip(read, past.marks)):
    then, now = past.called.get(str(number), day.name), days.mark(day)
    if then != day.name:
      raise ValueError(
        f'{out}: day {day.name} was begun as day {then}; call it so again, or '
        'give another --out'
      )
    for name in past.present:
      if now.get(name) != marks.get(name):
        raise ValueError(
          f'{out}: day {day.name} of {name} was begun with another text; give '
          'the one of then, or another --out'
        )
  new = sorted(set(days.owners(read)) - set(past.owners))
  if new:
    raise ValueError(
      f'{out}: {new[0]!r} is new; the owners of a life are those that it began '
      f'with ({", ".join(past.owners)}); give another --out'
    )
