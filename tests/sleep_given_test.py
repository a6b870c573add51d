"""A night refuses what it cannot go by before anything is done."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.models import stacking
from nestax.sleep import cycle, grow, tools
from nestax.sleep.reader import Said
from nestax.sleep.task import TaskError
from nestax.sleep.texts import Day, Words
from nestax.sleep.tools import CycleConfig

V = cases.V
CFG = cases.config(slots=2, rank=4)
SAID = Said(np.ones((2, 6), np.int32), np.ones(2, np.int32), np.full(2, 6))
DAY = Day((0, 1), ('ann', 'bob'), (SAID, SAID))
STATE = cases.day(CFG, 2)


def refuses(*words, error=ValueError):
  return pytest.raises(error, match='(?s)' + '.*'.join(words))


@functools.cache
def made():
  return tools.of_model(CFG, CycleConfig(), Words(0, -1, 0))


def night(tasks=(), past=None, **changed):
  def ended(*_):
    raise AssertionError('the night has begun')

  args = {
    'tools': made()._replace(compute=ended),
    'params': cases.params_of(CFG),
    'state': STATE,
    'day': DAY,
    'core': SAID,
    'number': 1,
    'key': jax.random.key(0),
  }
  cycle.night(**args | changed, tasks=tasks, past=past)


def said(token=1, length=6, dtype=np.int32):
  tokens_BxL = np.full((2, 6), token, dtype)
  return SAID._replace(tokens_BxL=tokens_BxL, length_B=np.full(2, length))


def test_what_fits_begins():
  with refuses('the night has begun', error=AssertionError):
    night(past=said(V - 1))


@pytest.mark.parametrize(
  'changed,words',
  [
    ({'day': DAY._replace(rows=(0, 2))}, ['row 2', '2 sequences', '0 to 1']),
    ({'day': DAY._replace(rows=(0, -1))}, ['row -1', '0 to 1']),
    ({'day': DAY._replace(rows=(1, 1))}, [r'rows \(1, 1\)', 'twice']),
    ({'day': DAY._replace(names=('ann',))}, [r'\(2, 1, 2\)', 'one of each']),
    ({'day': Day((), (), ())}, ['no owners']),
    ({'day': DAY._replace(read=(SAID, said(V)))}, ["'bob'", 'id 16']),
    ({'core': said(-1)}, ['core: token id -1', 'V=16']),
    ({'core': said(1, dtype=float)}, ['core', 'float64', 'whole numbers']),
    ({'core': said(length=7)}, ['core: length_B', 'at most 6']),
    ({'core': jnp.ones((2, 6), int)}, ['core: a ArrayImpl', 'Said']),
    ({'past': said(99)}, ['past: token id 99']),
    ({'state': None}, ['a NoneType without levels']),
    ({'state': cases.day(CFG, 1)}, ['row 1', '1 sequences']),
    ({'number': 0}, ['number=0', 'from 1']),
    ({'params': {'params': {}}}, ["{'params': ...}"]),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changed, words):
  with refuses(*words):
    night(**changed)


class Task:
  name = 'mine'

  def __init__(self, context=1, question=1, answer=1):
    self.ids = context, question, answer

  def context(self):
    return [0, self.ids[0]]

  def questions(self):
    return [([0], [1]), ([0, self.ids[1]], [self.ids[2]])]


@pytest.mark.parametrize('part', ['context', 'question', 'answer'])
def test_a_task_of_other_ids_is_refused(part):
  with refuses('mine: token id 16 in task 1', '0 to 15', error=TaskError):
    night(tasks=[Task(), Task(**{part: V})])


@pytest.mark.parametrize(
  'ids,words',
  [
    (Words(V, -1, 0), ['bos=16', 'from 0 to 15']),
    (Words(0, V, 0), ['eos=16', 'from -1 to 15']),
    (Words(0, -1, -1), ['pad=-1', 'from 0 to 15']),
    (Words(0, -1, 0, np.ones(15, bool)), [r'allowed_V .*\(15,\)', r'\(16,\)']),
    (Words(0, -1, 0, np.ones(16)), ['allowed_V .*float64', 'bool']),
    (Words(0, -1, 0, np.zeros(16, bool)), ['allowed_V', 'one at least']),
  ],
)
def test_ids_that_the_vocabulary_does_not_have_are_refused(ids, words):
  with refuses(*words):
    tools.of_model(CFG, CycleConfig(), ids)


def test_parameters_in_their_collection_are_refused():
  boxed = {'params': cases.params_of(CFG)}
  plain = cases.config(family='hope_attention')
  with refuses("{'params': ...}"):
    grow.equip(plain, boxed, 2, 2, jax.random.key(0))
  with refuses("{'params': ...}"):
    cfg = cases.config(family='transformer', blocks='none')
    stacking.stack(cfg, boxed, 'groups', plain.cms)
