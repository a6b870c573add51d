"""Strings are of their language, and every class says what may follow."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from nestax.launch.evals import entrants, formal, suite, trials
from nestax.models import hope
from nestax.models.memory import api, types

WORDS = {
  'parity': lambda w: w.count('1') % 2 == 0,
  '(aa)*': lambda w: set(w) <= {'0'} and len(w) % 2 == 0,
  '(abab)*': lambda w: w == '0101' * (len(w) // 4),
  'a^n b^n': lambda w: w == '0' * (len(w) // 2) + '1' * (len(w) // 2),
  'a^n b^n c^n': lambda w: w == ''.join(c * (len(w) // 3) for c in '012'),
  'shuffle-2': lambda w: _balanced(w, '01') and _balanced(w, '23'),
}


def _balanced(word, kind):
  depth = 0
  for c in word:
    depth += (c == kind[0]) - (c == kind[1])
    if depth < 0:
      return False
  return depth == 0


def _extends(name, prefix, bound):
  """Whether a string of the language that is not too long begins so."""
  language = WORDS[name]
  if name == 'shuffle-2':
    return all(
      prefix[: i + 1].count(a) >= prefix[: i + 1].count(b)
      for i in range(len(prefix))
      for a, b in ('01', '23')
    )
  tails = {
    '(aa)*': ['', '0'],
    '(abab)*': ['', '1', '01', '101'],
    'parity': ['', '1'],
  }
  if name in tails:
    return any(language(prefix + tail) for tail in tails[name])
  letters = '01' if name == 'a^n b^n' else '012'
  return any(
    ''.join(c * n for c in letters).startswith(prefix) for n in range(bound)
  )


@pytest.mark.parametrize('name', formal.LANGUAGES)
def test_classes_say_what_may_follow(name):
  language = formal.LANGUAGES[name]
  low = 1 if language.letters else 2
  draw = formal.strings(language, low, 12, distinct=True)
  rows = draw(np.random.default_rng(0), 60)
  follows = {}
  for tokens, targets, weights in zip(
    rows['tokens'], rows['targets'], rows['weights']
  ):
    n = int(weights.sum())
    assert weights[:n].all() and not weights[n:].any()
    assert low <= n <= 12 * max(1, language.letters)
    word = ''.join(map(str, tokens[:n]))
    assert WORDS[name](word), word
    for i in range(1, n + 1):
      prefix = word[:i]
      nexts = {c for c in '0123' if _extends(name, prefix + c, 40)}
      if name.endswith('*'):  # the class is only whether it may end
        nexts = set()
      if WORDS[name](prefix):
        nexts.add('end')
      seen = follows.setdefault(int(targets[i - 1]), frozenset(nexts))
      if name == 'shuffle-2':  # whether it may end follows from the brackets
        assert (targets[i - 1] & 1 > 0) == ('1' in nexts)
        assert (targets[i - 1] & 2 > 0) == ('3' in nexts)
      else:
        assert seen == nexts, (prefix, targets[i - 1])
  if name != 'shuffle-2':  # no two classes for one and the same
    assert len(set(follows.values())) == len(follows)
  words = {
    t.tobytes() + w.tobytes() for t, w in zip(rows['tokens'], rows['weights'])
  }
  assert len(words) == len(rows['tokens'])


def test_bins_are_of_their_lengths():
  made = formal.problem('parity', formal.Options(20, 40))
  rng = np.random.default_rng(0)
  lengths = {
    name: draw(rng, 200)['weights'].sum(1) for name, draw in made.tests.items()
  }
  assert lengths['bin 0'].max() == 20 and lengths['bin 0'].min() == 2
  assert lengths['bin 1'].max() == 40 and lengths['bin 1'].min() == 22


@pytest.mark.parametrize('name', formal.LANGUAGES)
def test_no_string_is_tested_that_the_evaluation_is_picked_by(name):
  options = formal.Options(20, 40)
  made = formal.problem(name, options)
  letters = formal.LANGUAGES[name].letters
  asks = {}
  for part, draws in (('valid', made.valid), ('tests', made.tests)):
    for bin_, draw in draws.items():
      rows = draw(np.random.default_rng(len(part)), 200)
      asks[part, bin_] = {
        tuple(tokens[weights > 0])
        for tokens, weights in zip(rows['tokens'], rows['weights'])
      }
  for bin_, low, high in (('bin 0', 1, 20), ('bin 1', 21, 40)):
    one, other = asks['valid', bin_], asks['tests', bin_]
    assert not one & other
    period = {'(aa)*': 2, '(abab)*': 4}.get(name, 1)
    if letters or name.endswith('*'):  # together they are all that there are
      lengths = sorted(len(text) // max(1, letters) for text in one | other)
      every = [n for n in range(low, high + 1) if n % period == 0]
      assert lengths == every
      assert min(len(one), len(other)) * 4 >= len(every)
    else:
      assert len(one) == len(other) == 200


def test_brackets_interleave():
  rows = formal.strings(formal.LANGUAGES['shuffle-2'], 4, 8, False)(
    np.random.default_rng(0), 100
  )
  nested = ('0', '1'), ('2', '3')
  crossing = 0
  for tokens, weights in zip(rows['tokens'], rows['weights']):
    stack = []
    for c in map(str, tokens[weights > 0]):
      if c in '02':
        stack.append(c)
      elif (stack.pop(), c) not in nested:
        crossing += 1
        break
  assert crossing > 10


def test_hope_is_given_what_parity_needs_and_others_are_not():
  asked = suite.Asked(('hope', 'transformer'))
  cells = [*formal.cells(formal.EVALUATION.options, asked)]
  found = {
    cell.model: cell.key['config']['memory']
    for cell in cells
    if cell.task == 'parity'
  }
  counters = [
    cell.task
    for cell in cells
    if cell.key['config']['memory']['objective'] == 'dot'
  ]
  assert counters == ['a^n b^n', 'a^n b^n c^n', 'shuffle-2']
  assert found['hope']['chunk_mem'] == 1 < 100 < found['hope']['chunk_rest']
  assert found['hope']['eta_max'] == 1.0
  options = formal.EVALUATION.options
  parity = formal.problem('parity', options)
  cfg = entrants.config('hope', options.train.base(2), parity.own)
  variables = hope.InitialValues(cfg).init(jax.random.key(0))
  first = nn.unbox(variables)['params']['eta_bias']
  np.testing.assert_array_equal(first, np.full(cfg.H, 2.0))
  word = 'hope:memory.eta_spread=6.0'
  cfg = entrants.config(word, options.train.base(2), parity.own)
  variables = hope.InitialValues(cfg).init(jax.random.key(0))
  first = nn.unbox(variables)['params']['eta_bias']
  np.testing.assert_array_equal(first, [2.0, 0.0, -2.0, -4.0])
  assert found['transformer']['chunk_mem'] == 64
  paper = formal.EVALUATION.paper['Transformer']
  assert paper['parity bin 0'] == 46.4 and paper['shuffle-2 bin 1'] == 100


def test_what_counts_takes_nothing_off_what_it_wrote():
  # n times the same token: n times the same step
  options = formal.EVALUATION.options
  counts = formal.problem('a^n b^n', options)
  cfg = entrants.config('hope', options.train.base(3), counts.own).memory
  H, K, L = 2, 8, 150
  keys = iter(jax.random.split(jax.random.key(0), 9))

  def draw(*shape):
    return jax.random.normal(next(keys), shape)

  initial = {box: {'kernel': draw(H, K, K)} for box in cfg.boxes}
  gate = {'kernel': draw(H, K), 'bias': np.zeros(H, np.float32)}
  initial |= {'eta': gate, 'alpha': gate}
  token = [np.broadcast_to(draw(1, 1, H, K), (1, L, H, K)) for _ in range(3)]
  inputs = types.Inputs(*token, None, None)
  _, o_1xLxHxK = api.run(cfg, initial, None, inputs)
  step = np.diff(np.asarray(o_1xLxHxK, np.float64), axis=1)
  assert np.abs(step[:, :1]).max() > 0.01
  np.testing.assert_allclose(step, step[:, :1] + 0 * step, atol=3e-5)


def test_lengths_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='longest=50, beyond=52'):
    formal.Options(50, 52)
  with pytest.raises(ValueError, match='rates=.*above 0'):
    dataclasses.replace(trials.Training(), rates=(0.0,))
