"""What a life is told to know, against what the same models answer."""

import json

import jax
import jax.numpy as jnp
import nights_cases as cases
import numpy as np
import pytest

from nestax.cms.experts import SlotsError
from nestax.launch import nights, recall
from nestax.sleep import cycle, grow
from nestax.sleep import reader as readers
from nestax.sleep.gate import Decision
from nestax.sleep.lineage import Lineage


def night(tools, params, state, day, *how):
  """Stands for a night: grows a slot that holds something, frees the levels."""
  cfg = tools.cfg
  params, index = grow.grow(cfg, params, 1)
  new = grow.take(cfg, params, 1, index)
  noise = jax.random.normal(jax.random.key(7), new.b_nxRxD.shape)
  params = grow.put(cfg, params, 1, index, new._replace(b_nxRxD=noise))
  for k in range(2):
    state = grow.empty(cfg, state, k)
  names = 'core_before', 'core_after', 'day_before', 'day_dusk', 'day_after'
  metrics = dict.fromkeys(names, 1.0)
  decision = Decision(True, 'accepted')
  return cycle.Night(params, state, decision, day.names, metrics, {})


def test_questions_are_asked_before_and_after_each_night(
  tmp_path, capsys, monkeypatch
):
  texts = cases.write_texts(tmp_path / 'texts')
  lines = [
    {'question': text[at - 9 : at].strip(), 'answer': text[at], 'owner': owner}
    | {'choices': [chr(65 + at % 20), chr(34 + at)], 'day': day}
    for owner, day, first in (
      ('ann', '1', 10),
      ('bob', '1', 10),
      ('ann', '2', 46),
    )
    for text in [(texts / f'{owner}.txt').read_text()]
    for at in range(first, first + 14)
    if text[at] != ' '
  ]
  lines.append({'question': 'aaaa', 'answer': 'b', 'owner': 'bob'})
  path = tmp_path / 'q.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)))
  plan = cases.plan(texts, asked=str(path), nights=1)
  seen = []

  def watched(tools, params, state, *how):
    copy = jax.tree.map(jnp.copy, state)  # the next reading uses it up
    seen[:] = params, copy, night(tools, params, state, *how)
    return seen[-1]

  monkeypatch.setattr(nights.owners, 'night', watched)
  put, whom = nights.quiz.dusk, []
  monkeypatch.setattr(
    nights.quiz, 'dusk', lambda who, *x: whom.append(who) or put(who, *x)
  )
  nights.live(plan, tmp_path / 'life')
  # what has been gathered since the last commit is known, too
  for level in whom[0].state.levels.levels:
    assert not np.asarray(level.count_B).any()
  params, dusk, woke = seen
  tools, names = plan.tools, ('ann', 'bob')
  context = readers.learned(tools.compute(params, dusk))
  sheets = {(part.owner, part.day): part.sheet for part in plan.asked}

  def share(params, day, level=None):
    known = []
    for row, name in enumerate(names):
      own = jax.tree.map(lambda x, row=row: x[:, row : row + 1], context)
      if level is None:
        own = None
      elif level != 'all':
        own = tuple(
          jax.tree.map(lambda y, on=k == level: y * on, x)
          for k, x in enumerate(own)
        )
      if sheet := sheets.get((name, day)):
        known.append(recall.right(tools.reader, params, own, sheet))
    return pytest.approx(np.concatenate(known).mean())

  first, second = cases.rows(tmp_path / 'life')
  assert set(first['recall']['morning']) == {'1', '2', ''}
  got = second['recall']
  asked = got['asked']
  assert (asked['1'] + asked['2'], asked['']) == (len(lines) - 1, 1)
  assert got['chance'] == pytest.approx({'1': 1 / 3, '2': 1 / 3, '': 0})
  for day in ('1', ''):  # day 2 is not read yet
    assert got['slow'][day] == first['recall']['morning'][day]
    assert got['slow'][day] == share(params, day)
    assert got['dusk'][day] == share(params, day, 'all')
    for k, name in enumerate(('every 4', 'every 8')):
      assert got['alone'][name][day] == share(params, day, k)
  for day in ('1', '2', ''):
    assert got['morning'][day] == share(woke.params, day)
  without = got['without']
  assert without['every 4'] is None and set(without['every 8']) == {'1', ''}
  assert set(got['dusk']) == {'1', ''}
  # there were no slots before
  assert without['every 8'] == got['slow']
  # what levels and slots do shows in the numbers, or they would not tell them
  assert got['dusk']['1'] != got['slow']['1'] != got['morning']['1']
  version = Lineage(tmp_path / 'life' / 'lineage.jsonl').versions()[1]
  assert version.metrics['recall_asked'] == asked['1']
  for name in ('slow', 'dusk', 'morning'):
    assert version.metrics[f'recall_{name}'] == got[name]['1']
  said = capsys.readouterr().out
  assert f'slept on ({asked["1"]} questions, chance 33%)' in said
  # a night that finds no slot does not ask first

  def full(*args):
    raise SlotsError('all slots are used up')

  monkeypatch.setattr(cycle, 'check_room', full)
  whom.clear()
  with pytest.raises(SlotsError):
    nights.live(cases.plan(texts, asked=str(path), nights=2), tmp_path / 'life')
  assert not whom
