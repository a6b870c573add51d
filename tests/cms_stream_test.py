"""The active phase against a slow transcription, on a toy network."""

import functools

import cms_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cms_cases import B, L

from nestax.cms import fresh, resume
from nestax.cms import level as levels_
from nestax.cms.stream import StreamConfig
from nestax.cms.update import UpdateConfig

SLOW, RATES, X = cases.inputs()
RESETS = {'': np.zeros((B, L), bool), 'resets': cases.resets()}
reset_cases = pytest.mark.parametrize('reset', RESETS)
# how what is read by chunks is recomputed; no value may depend on it
REMAT = {'one level': 'chunks', 'two levels': '', 'nested': 'chunks'}
stream_cases = pytest.mark.parametrize('name', cases.STREAMS)


def through(name):
  return cases.STREAMS[name][3]


def levels_of(name):
  return len(cases.STREAMS[name][0])


@functools.cache
def fresh_whole(name, differentiate='full'):
  """Reads fresh sequences: (outputs, levels at the end, surprise)."""
  cfg, K = cases.stream_config(name, differentiate), levels_of(name)

  def run(slow, rates, x_BxLxD, reset_BxL):
    net = cases.toy(slow, through(name), cfg.periods)
    piece = cases.piece(x_BxLxD, reset_BxL)
    levels = cases.toy_levels(cfg, len(x_BxLxD))
    mixers = cases.toy_mixers(len(x_BxLxD))
    given = rates, levels, mixers, piece
    return fresh.run(cfg, net, *given, REMAT.get(name, 'groups'))

  return jax.jit(lambda s, r, x, reset: run(s[:K], r[:K], x, reset))


def read_fresh(name, differentiate='full'):
  return lambda *inputs: fresh_whole(name, differentiate)(*inputs)[0]


@functools.cache
def read_on(name):
  cfg, K = cases.stream_config(name), levels_of(name)
  net = cases.toy(SLOW[:K], through(name))

  def run(state, mixers, x_BxLxD, reset_BxL):
    piece = cases.piece(x_BxLxD, reset_BxL)
    return resume.run(cfg, net, RATES[:K], state, mixers, piece)

  return jax.jit(run)


@functools.cache
def flushed(name):
  cfg, K = cases.stream_config(name), levels_of(name)
  net = cases.toy(SLOW[:K], through(name))
  return jax.jit(lambda *args: resume.flush(cfg, net, RATES[:K], *args))


def plain_rows(name, reset, flush_after=(), stop_after=L):
  """(Plain, outputs) of each sequence."""
  cfg, K = cases.stream_config(name), levels_of(name)
  rows = []
  for b in range(B):
    plain, out = cases.Plain(cfg, SLOW[:K], RATES[:K]), []
    for t in range(stop_after):
      out.append(plain.read(X[b, t], reset[b, t]))
      if t + 1 in flush_after:
        plain.flush()
    rows.append((plain, np.stack(out)))
  return rows


@functools.cache
def plain_read(name, reset):
  return plain_rows(name, RESETS[reset])


def stream(name, reset, sizes, flush_after=()):
  """(state, mixers, outputs) of a stream cut into pieces."""
  cfg = cases.stream_config(name)
  state, mixers, at, out = cases.toy_state(cfg), cases.toy_mixers(), 0, []
  for size in sizes:
    cut = slice(at, at + size)
    state, mixers, y = read_on(name)(state, mixers, X[:, cut], reset[:, cut])
    at += size
    out.append(y)
    if at in flush_after:
      state = flushed(name)(state, mixers)
  return state, mixers, np.concatenate(out, axis=1)


def close(a, b, atol=2e-5):
  np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def check_state(state, mixers, plains):
  for b, plain in enumerate(plains):
    close(mixers[0, b], plain.mixer)
    assert state.clock_B[b] == plain.clock
    assert state.held_B[b] == len(plain.held)
    assert state.skip_B[b] == plain.skip
    for t, (_, x_D) in enumerate(plain.held):
      close(state.held.x_BxLxD[b, t], x_D)
    for k, level in enumerate(state.levels):
      row = lambda tree, b=b: [np.asarray(x)[:, b] for x in tree]  # noqa: E731
      for got, want in (
        (levels_.weights(level), plain.delta[k]),
        (level.total, plain.total[k]),
        (level.origin, plain.origin[k]),
        (level.origin_total, plain.origin_total[k]),
      ):
        if got is not None:
          jax.tree.map(close, row(got), list(want))
      assert level.count_B[b] == plain.count[k]
      assert level.commits_B[b] == plain.commits[k]


@reset_cases
@stream_cases
def test_fresh_sequences_read_as_the_transcription_does(name, reset):
  got = read_fresh(name)(SLOW, RATES, X, RESETS[reset])
  want = np.stack([y for _, y in plain_read(name, reset)])
  close(got, want)
  # the levels have learned something to get wrong
  frozen = read_fresh(name)(SLOW, [0 * r for r in RATES], X, RESETS[reset])
  assert np.abs(frozen - want).max() > 0.05


@reset_cases
@stream_cases
def test_streams_read_as_the_transcription_does(name, reset):
  rows = plain_read(name, reset)
  cuts = [[7] * 3 + [1] * 6] + [[L]] * (name == 'three levels')
  for sizes in cuts:
    state, mixers, got = stream(name, RESETS[reset], sizes)
    close(got, np.stack([y for _, y in rows]))
    check_state(state, mixers, [plain for plain, _ in rows])
    _, levels, surprise_B = fresh_whole(name)(SLOW, RATES, X, RESETS[reset])
    close(surprise_B, state.surprise_B)
    for here, there in zip(levels, state.levels):
      assert np.array_equal(here.commits_B, there.commits_B)
      close(here.moved_B, there.moved_B)
    assert levels[0].commits_B.max() > 0 and surprise_B.max() > 0


def test_no_resets_are_resets_nowhere():
  cfg, K = cases.stream_config('three levels'), 3
  net, piece = cases.toy(SLOW[:K]), cases.piece(X)
  levels, mixers = cases.toy_levels(cfg), cases.toy_mixers()
  want = read_fresh('three levels')(SLOW, RATES, X, RESETS[''])
  run = jax.jit(lambda: fresh.run(cfg, net, RATES, levels, mixers, piece)[0])
  close(run(), want)
  state = cases.toy_state(cfg)
  go_on = jax.jit(lambda: resume.run(cfg, net, RATES, state, mixers, piece))
  close(go_on()[2], want)


@pytest.mark.parametrize('name', ['three levels', 'nested'])
def test_flush_learns_from_what_is_pending_and_keeps_the_grid(name):
  # inside a chunk, at the end of one, of one token, and right after another
  for reset in RESETS.values():
    at = (7, 8, 9, 15, 21, 27)
    rows = plain_rows(name, reset, flush_after=at)
    sizes = [7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    state, mixers, got = stream(name, reset, sizes, at)
    close(got, np.stack([y for _, y in rows]))
    check_state(state, mixers, [plain for plain, _ in rows])


def test_a_stream_shorter_than_the_smallest_period_is_all_pending():
  name = 'one level'
  state, mixers, _ = stream(name, RESETS[''], [1, 1])
  assert not any(x.any() for x in levels_.weights(state.levels[0]))
  assert list(state.held_B) == [2] * B
  done = flushed(name)(state, mixers)
  assert list(done.levels[0].commits_B) == [1] * B
  assert list(done.clock_B) == [2] * B and not done.held_B.any()
  again = flushed(name)(done, mixers)
  for a, b in zip(again.levels, done.levels):
    jax.tree.map(np.testing.assert_array_equal, a.delta, b.delta)
  # fresh sequences drop it
  out = read_fresh(name)(SLOW, RATES, X[:, :2], RESETS[''][:, :2])
  assert out.shape == (B, 2, cases.D)


def test_surprise_is_the_mean_objective_of_the_last_chunk_learned_from():
  name, reset = 'three levels', cases.resets()
  state, _, _ = stream(name, reset, [L])
  for b, (_, y) in enumerate(plain_read(name, 'resets')):
    # the last whole chunk is tokens 20 to 23, in which no document starts
    error = y[20:23] - X[b, 21:24]
    close(state.surprise_B[b], 0.5 * np.square(error).sum(1).mean())


def test_forgetting_is_a_documents_start_without_the_mixers():
  for at in (8, 10):
    cfg = cases.stream_config('three levels')
    run = read_on('three levels')
    state, mixers, _ = stream('three levels', RESETS[''], [1] * at)
    state = resume.forget(cfg, state)
    assert state.skip_B.all() == (at % 4 != 0)
    reset = np.ones((B, 1), bool)
    other = state._replace(skip_B=~state.skip_B & (at % 4 != 0))
    begun, _, _ = run(other, mixers, X[:, at : at + 1], reset)
    went, _, _ = run(state, mixers, X[:, at : at + 1], ~reset)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
      levels_.weights(went.levels[0]),
      levels_.weights(begun.levels[0]),
    )
    assert not any(x.any() for x in levels_.weights(went.levels[2]))
    np.testing.assert_array_equal(went.skip_B, begun.skip_B)


def score(y):
  return jnp.sum(jnp.sin(y))


def joined(rows):
  """One state of row i of the i-th of some states."""
  cfg = cases.stream_config('three levels')
  shapes = [
    jax.eval_shape(lambda r=r: (cases.toy_state(cfg, r), cases.toy_mixers(r)))
    for r in (1, 2)
  ]

  def pick(one, two, *leaves):
    axis = [i for i, (a, b) in enumerate(zip(one.shape, two.shape)) if a != b]
    parts = [np.take(x, [i], axis[0]) for i, x in enumerate(leaves)]
    return np.concatenate(parts, axis[0])

  return jax.tree.map(pick, *shapes, *rows)


@reset_cases
def test_sequences_whose_clocks_differ_are_read_as_each_alone(reset):
  name, reset_BxL = 'three levels', RESETS[reset]
  starts = (4, 7, 13)
  states = [stream(name, reset_BxL, [1] * at)[:2] for at in starts]
  state, mixers = joined(states)
  assert list(state.clock_B) == list(starts)
  x = np.stack([X[b, at : at + 14] for b, at in enumerate(starts)])
  r = np.stack([reset_BxL[b, at : at + 14] for b, at in enumerate(starts)])
  state, mixers, got_a = read_on(name)(state, mixers, x[:, :7], r[:, :7])
  state, mixers, got_b = read_on(name)(state, mixers, x[:, 7:], r[:, 7:])
  got = np.concatenate([got_a, got_b], axis=1)
  plains = []
  for b, at in enumerate(starts):
    plain, want = plain_rows(name, reset_BxL, stop_after=at + 14)[b]
    close(got[b], want[at:])
    plains.append(plain)
  check_state(state, mixers, plains)


@pytest.mark.parametrize(
  'name, differentiate',
  [
    ('one level', 'full'),
    pytest.param('nested', 'full', marks=pytest.mark.slow),
    ('three levels', 'first_order'),
  ],
)
def test_outer_gradients_are_those_of_the_transcription(name, differentiate):
  cfg, K = cases.stream_config(name), levels_of(name)
  stop = jax.lax.stop_gradient if differentiate != 'full' else lambda g: g
  # one row in which documents start, cut where the slowest level has written
  x_LxD, reset_L = jnp.asarray(X[1, :18]), cases.resets()[1, :18]
  args = jax.tree.map(jnp.asarray, (SLOW[:K], RATES[:K]))

  def plain(slow, rates, x_LxD):
    one, out = cases.Plain(cfg, slow, rates, stop), []
    for x_D, begins in zip(x_LxD, reset_L):
      out.append(one.read(x_D, begins))
    return score(jnp.stack(out))

  def stream(slow, rates, x_LxD):
    run = read_fresh(name, differentiate)
    return score(run(slow, rates, x_LxD[None], reset_L[None]))

  got = jax.jit(jax.grad(stream, (0, 1, 2)))(*args, x_LxD)
  want = jax.grad(plain, (0, 1, 2))(*args, x_LxD)
  jax.tree.map(lambda a, b: close(a, b, 1e-4), got, want)
  for leaf in jax.tree.leaves(got[:2]):
    assert np.abs(leaf).reshape(len(leaf), -1).max(1).min() > 1e-4


@pytest.mark.parametrize(
  'periods', [pytest.param((2,), marks=pytest.mark.slow), (2, 8)]
)
def test_by_groups_what_is_kept_grows_as_the_root_of_the_chunks(periods):
  cfg, rows, K = StreamConfig(periods, UpdateConfig(), 'full'), 16, len(periods)

  def bytes_of(length, remat):
    def run(slow, x_BxLxD):
      given = cases.toy_levels(cfg, rows), cases.toy_mixers(rows)
      net, piece = cases.toy(slow), cases.piece(x_BxLxD)
      return score(fresh.run(cfg, net, RATES[:K], *given, piece, remat)[0])

    x_BxLxD = jax.ShapeDtypeStruct((rows, length, cases.D), jnp.float32)
    compiled = jax.jit(jax.grad(run)).lower(SLOW[:K], x_BxLxD).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = bytes_of(32, 'groups'), bytes_of(128, 'groups')
  # tokens and what is read of them are kept whatever is recomputed
  assert many < 2.5 * few
  assert 2 * many < bytes_of(128, 'chunks')


@pytest.mark.parametrize(
  'values,words',
  [
    ({'periods': (8, 4)}, '4 is not a larger multiple of 8'),
    ({'periods': (4, 6)}, '6 is not a larger multiple of 4'),
    ({'periods': ()}, r'periods=\(\): one at least'),
    ({'periods': (1, 4)}, r'periods=\(1, 4\): .*2 tokens or more'),
    ({'differentiate': 'half'}, "differentiate='half': .*first_order"),
  ],
)
def test_a_stream_that_cannot_be_is_refused(values, words):
  with pytest.raises(ValueError, match=words):
    StreamConfig(**{'periods': (4, 8), 'update': UpdateConfig(), **values})


@pytest.mark.parametrize('read', ['fresh', 'on'])
@pytest.mark.parametrize(
  'levels,rates,words',
  [
    (1, RATES[:2], '1 levels and 2 rates .*one of each'),
    (2, RATES[:1], '2 levels and 1 rates'),
    (3, RATES, '3 levels and 3 rates'),
    (2, (0.1, 0.1), r'rates\[0\] of the shape \(\): \(2,\) is wanted'),
    (2, (RATES[0], np.ones(3)), r'rates\[1\] of the shape \(3,\)'),
  ],
)
def test_levels_and_rates_are_one_a_period(read, levels, rates, words):
  cfg = cases.stream_config('two levels')
  net, state = cases.toy(SLOW[:2], True), cases.toy_state(cfg)
  every = (*state.levels, state.levels[0])[:levels]
  rest = cases.toy_mixers(), cases.piece(X)
  with pytest.raises(ValueError, match=words):
    if read == 'fresh':
      fresh.run(cfg, net, rates, every, *rest)
    else:
      resume.run(cfg, net, rates, state._replace(levels=every), *rest)


def test_a_state_of_another_smallest_period_is_refused():
  cfg = cases.stream_config('two levels')
  state = cases.toy_state(cases.stream_config('three levels'))
  state = state._replace(levels=state.levels[:2])
  net = cases.toy(SLOW[:2], True)
  with pytest.raises(ValueError, match='room for 4 .* smallest period of 3'):
    resume.run(cfg, net, RATES[:2], state, cases.toy_mixers(), cases.piece(X))
