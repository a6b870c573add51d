"""Models whose levels learn as they read: streams, independence, causality."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cms_cases import MODELS

from nestax.cms import fresh
from nestax.cms import level as levels_
from nestax.models import active, language_model, model_state, segments
from nestax.models.config import ModelConfig

B, L, PIECE = 4, 28, 7
V = B * L  # every token of `distinct` stands once


def slow(name):
  return pytest.param(name, marks=pytest.mark.slow)


cases = pytest.mark.parametrize(
  'name',
  [slow(name) if name in ('attention', 'local') else name for name in MODELS],
)
some = pytest.mark.parametrize('name', [slow('hope'), 'windowed', 'groups'])


def config(name, **changes):
  values = {'V': V, 'D': 8, 'N': 2, 'H': 2, 'F': 12, 'dtype': 'float32'}
  values |= {'memory': {'chunk_mem': 4, 'chunk_rest': 4}, 'tied': False}
  family, cms = MODELS[name]
  cms = {'multiple': 4, 'rate': 0.3} | cms | changes.pop('cms', {})
  return ModelConfig.from_dict(values | family | {'cms': cms} | changes)


@functools.cache
def build(name):
  cfg = config(name)
  model = language_model.LanguageModel(cfg)
  tokens = jnp.zeros((1, 1), jnp.int32)
  boxed = jax.jit(model.init)(jax.random.key(0), None, tokens)['params']
  return cfg, nn.unbox(boxed), jax.jit(model.apply)


def distinct():
  """Tokens that stand once each: their rows say where a gradient came from."""
  return jax.random.permutation(jax.random.key(1), V).reshape(B, L)


def resets():
  """At the starts of chunks and inside them; row 3 has none."""
  reset = np.zeros((B, L), bool)
  reset[0, 7] = reset[1, 12] = reset[2, 5] = reset[2, 20] = True
  return reset


def read_fresh(name, tokens=None, reset=None, params=None):
  _, own, run = build(name)
  tokens = distinct() if tokens is None else tokens
  reset = resets() if reset is None else reset
  return run({'params': params or own}, None, tokens, reset)[1]


def start(name):
  return model_state.init_state(build(name)[0], B, length=L)


def read_on(name, state, tokens, reset):
  _, params, run = build(name)
  return run({'params': params}, state, tokens, reset)


@functools.cache
def by_token(name):
  """(logits, state after each token) of a stream of single tokens."""
  state, out, states = start(name), [], []
  for t in range(L):
    state, logits = read_on(
      name, state, distinct()[:, t : t + 1], resets()[:, t : t + 1]
    )
    out.append(logits)
    states.append(jax.tree.map(np.asarray, state))
  return np.concatenate(out, axis=1), states


@functools.cache
def by_piece(name, changed=False):
  """(logits, final state) of a stream of pieces that fit no period."""
  state, out, tokens = start(name), [], distinct()
  if changed:
    tokens = tokens.at[1].set(tokens[1, ::-1])
  for at in range(0, L, PIECE):
    cut = slice(at, at + PIECE)
    state, logits = read_on(name, state, tokens[:, cut], resets()[:, cut])
    out.append(logits)
  return np.concatenate(out, axis=1), state


def close(a, b, atol=2e-5):
  np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def same_states(got, want):
  """Compares what is alive: not what lies beyond the pending tokens."""

  def alive(state):
    if state.levels is None:
      return state
    levels = state.levels
    at = np.arange(levels.held.tokens_BxL.shape[1])[None]
    mask = at < np.asarray(levels.held_B)[:, None]
    held = jax.tree.map(
      lambda x: x * mask.reshape(mask.shape + (1,) * (x.ndim - 2)), levels.held
    )
    return state._replace(levels=levels._replace(held=held))

  jax.tree.map(close, alive(got), alive(want))


def rows_of(cfg):
  """For each leaf of a state, its axis of sequences."""
  one, two = (
    jax.eval_shape(lambda b=b: model_state.init_state(cfg, b, length=L))
    for b in (1, 2)
  )
  return jax.tree.map(
    lambda a, b: [i for i, n in enumerate(a.shape) if n != b.shape[i]][0],
    one,
    two,
  )


def joined(name, states):
  """The state whose row i is row i of the i-th state."""
  return jax.tree.map(
    lambda axis, *leaves: np.concatenate(
      [np.take(x, [i], axis) for i, x in enumerate(leaves)], axis
    ),
    rows_of(build(name)[0]),
    *states,
  )


@cases
def test_a_stream_cut_anywhere_reads_as_fresh_sequences(name):
  want = read_fresh(name)
  close(by_piece(name)[0], want)
  close(by_token(name)[0], want)
  same_states(by_token(name)[1][-1], by_piece(name)[1])
  frozen = read_fresh(name, params=without_rates(name))
  assert np.abs(frozen - want).max() > 1e-3


def without_rates(name):
  _, params, _ = build(name)
  return params | {'log_rate': jnp.full_like(params['log_rate'], -70.0)}


@pytest.mark.parametrize('name', ['windowed'])
def test_a_stream_in_one_piece_ends_where_one_in_pieces_does(name):
  state, logits = read_on(name, start(name), distinct(), resets())
  close(logits, read_fresh(name))
  same_states(state, by_piece(name)[1])


@cases
def test_sequences_are_independent_to_the_bit(name):
  (a, state_a), (b, state_b) = by_piece(name), by_piece(name, changed=True)
  others = [0, 2, 3]
  np.testing.assert_array_equal(a[others], b[others])
  assert np.abs(a[1] - b[1]).max() > 0
  jax.tree.map(
    lambda axis, x, y: np.testing.assert_array_equal(
      np.take(x, others, axis), np.take(y, others, axis)
    ),
    rows_of(build(name)[0]),
    state_a,
    state_b,
  )


@cases
def test_sequences_whose_clocks_differ_read_as_each_alone(name):
  starts = (3, 8, 12, 21)
  logits, states = by_token(name)
  state = joined(name, [states[at - 1] for at in starts])
  assert list(state.levels.clock_B) == list(starts)
  tokens = np.stack([distinct()[i, a : a + 7] for i, a in enumerate(starts)])
  reset = np.stack([resets()[i, a : a + 7] for i, a in enumerate(starts)])
  after, got = read_on(name, state, tokens, reset)
  for i, at in enumerate(starts):
    close(got[i], logits[i, at : at + 7])
  same_states(after, joined(name, [states[at + 6] for at in starts]))


@cases
def test_levels_change_at_their_commits_only(name):
  cfg, _, _ = build(name)
  _, states = by_token(name)
  reset = resets()
  moved = np.zeros((len(cfg.stream.periods), B), int)
  for t in range(1, L):
    old, new = states[t - 1].levels, states[t].levels
    for k, period in enumerate(cfg.stream.periods):
      for b in range(B):
        delta = [
          [np.asarray(x)[:, b] for x in state.levels[k].delta]
          for state in (old, new)
        ]
        changed = [(x != y).any() for x, y in zip(*delta)]
        if (t + 1) % period:
          assert not any(changed), (t, k, b)
        broken = reset[b, t - period + 2 : t + 1].any()
        if (t + 1) % period == 0 and not broken:
          assert all(changed), (t, k, b)
          moved[k, b] += 1
  assert moved[:, 3].min() > 0


@cases
def test_no_token_changes_what_was_said_before_it(name):
  want = read_fresh(name)
  for at in (5, 8, 19):
    changed = distinct().at[:, at].set(distinct()[:, 0])
    got = read_fresh(name, changed)
    np.testing.assert_array_equal(got[:, :at], want[:, :at])
    assert np.abs(got[:, at] - want[:, at]).max() > 0


WHOLE = 24  # tokens of whole periods: half the program to differentiate


@functools.cache
def gradient(name, length=WHOLE, **changes):
  model = language_model.LanguageModel(config(name, **changes))

  def score(params, weight_L, reset_BxL):
    tokens = distinct()[:, :length]
    _, logits = model.apply({'params': params}, None, tokens, reset_BxL)
    per_token = jnp.square(jnp.sin(logits)).mean(-1)
    return jnp.sum(per_token * weight_L[None])

  run = jax.jit(jax.grad(score))
  return lambda *args: run(build(name)[1], *args)


@some
def test_no_gradient_comes_from_a_later_token(name):
  for at in (6, 12, 22):
    weight_L = (jnp.arange(WHOLE) <= at).astype(jnp.float32)
    grads = gradient(name)(weight_L, resets()[:, :WHOLE])['embed']['embedding']
    came = np.abs(grads).max(-1)[distinct()[:, :WHOLE]]
    assert not came[:, at + 1 :].any()
    assert (came[3, : at + 1] > 0).all()


@some
def test_every_initial_value_and_rate_gets_an_outer_gradient(name):
  cfg, _, _ = build(name)
  # without documents that start: their first tokens read the slow weights only
  grads = gradient(name)(jnp.ones(WHOLE), np.zeros((B, WHOLE), bool))
  own = {k: v for k, v in grads.items() if k in ('blocks', 'log_rate')}
  for path, leaf in jax.tree.leaves_with_path(own):
    where = jax.tree_util.keystr(path)
    assert np.isfinite(leaf).all(), where
    if 'slots' in where:
      continue
    if 'value' in where and len(leaf) > len(cfg.adapting):
      leaf = leaf[jnp.array(cfg.adapting)]
    # a local objective's scales are learned through writes only
    if 'value' in where and cfg.cms.differentiate == 'first_order':
      continue
    sizes = np.abs(leaf).reshape(len(leaf), -1)
    if path[0].key == 'log_rate':
      assert (sizes > 1e-9).all(), (where, sizes)
    else:
      assert (sizes.max(1) > 1e-9).all(), (where, sizes.max(1))


@cases
def test_a_rate_of_zero_is_a_frozen_model(name):
  frozen = config(name, cms={'blocks': 'none'})
  model = language_model.LanguageModel(frozen)
  params = without_rates(name)
  run = jax.jit(model.apply)
  _, want = run({'params': params}, None, distinct(), resets())
  close(read_fresh(name, params=params), want)


@pytest.mark.parametrize('name', [slow('local'), slow('groups')])
def test_levels_of_first_order_are_read_at_once_as_by_chunks(name, monkeypatch):
  values, given = read_fresh(name), (jnp.ones(L), resets())
  grads = gradient(name, length=L)(*given)
  monkeypatch.setattr(fresh, '_at_once', lambda cfg, net: False)
  model = language_model.LanguageModel(build(name)[0])
  want = jax.jit(model.apply)(
    {'params': build(name)[1]}, None, distinct(), given[1]
  )
  close(values, want[1])
  want = gradient.__wrapped__(name, length=L)(*given)
  for path, leaf in jax.tree.leaves_with_path(want):
    got = functools.reduce(lambda tree, key: tree[key.key], path, grads)
    close(got, leaf, 1e-6 + 1e-4 * np.abs(leaf).max())
  rates = want['log_rate'][:, 0]
  assert np.abs(rates).min() > 1e-6, rates


def test_no_resets_are_resets_nowhere():
  # no token is then asked whether it is alive
  weight_L, nowhere = jnp.ones(WHOLE), np.zeros((B, WHOLE), bool)
  want = gradient('groups')(weight_L, nowhere)
  got = gradient('groups')(weight_L, None)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), got, want)


def test_blocks_are_read_in_a_loop_as_one_by_one(monkeypatch):
  cfg, params, _ = build('groups')
  model, want = language_model.LanguageModel(cfg), read_fresh('groups')
  for module in (active, segments):
    monkeypatch.setattr(module, 'FEW', 0)
  read = jax.jit(lambda r: model.apply({'params': params}, None, distinct(), r))
  close(read(resets())[1], want)


@pytest.mark.slow
@pytest.mark.parametrize('broken', [False, True])
def test_factors_change_no_outer_gradient_in_full(monkeypatch, broken):
  cms = {'objective': 'next_token', 'optimizer': 'sgd', 'periods': (2, 4)}
  cms |= {'variant': 'sequential', 'blocks': 'all'}
  cfg = config('windowed', N=1, cms=cms)
  model, tokens = language_model.LanguageModel(cfg), distinct()[:2, :9]
  reset = jnp.asarray(resets()[:2, 5:14]) if broken else None
  boxed = jax.jit(model.init)(jax.random.key(0), None, tokens[:, :1])

  def loss(params):
    _, logits = model.apply({'params': params}, None, tokens, reset)
    return jnp.square(jnp.sin(logits)).mean()

  got = jax.jit(jax.grad(loss))(nn.unbox(boxed['params']))
  made = active._net
  monkeypatch.setattr(
    active, '_net', lambda *given: made(*given)._replace(tapped=False)
  )
  want = jax.jit(jax.grad(loss))(nn.unbox(boxed['params']))
  assert np.abs(want['log_rate']).min() > 1e-7
  jax.tree.map(lambda a, b: close(a, b, 1e-7), got, want)


# of first order: in full, chunks are recomputed whatever the config says
@pytest.mark.parametrize('name', ['groups'])
def test_remat_changes_no_value(name):
  given = jnp.ones(WHOLE), resets()[:, :WHOLE]
  want = gradient(name)(*given)
  got = gradient(name, remat='full')(*given)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), got, want)


@pytest.mark.parametrize('name', ['windowed'])
def test_a_mesh_reads_as_one_device(name):
  cfg, params, run = build(name)
  mesh = jax.make_mesh(
    (2, 2, 2), ('data', 'fsdp', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )  # fmt: skip
  state = start(name)
  state = jax.device_put(state, model_state.state_shardings(mesh, state))
  for leaf in jax.tree.leaves((state.levels.levels, state.levels.boundary)):
    assert not leaf.sharding.is_fully_replicated, leaf.shape
  with jax.set_mesh(mesh):
    for at in range(0, L, PIECE):
      cut = slice(at, at + PIECE)
      state, logits = run(
        {'params': params}, state, distinct()[:, cut], resets()[:, cut]
      )
  want, want_state = by_piece(name)
  close(logits, want[:, -PIECE:])
  same_states(state, want_state)


@pytest.mark.parametrize('name', ['windowed', 'groups'])
def test_flush_writes_what_is_pending_and_moves_no_clock(name):
  cfg, params, _ = build(name)
  state = by_token(name)[1][10]  # two or three tokens are pending
  done = jax.jit(lambda p, s: language_model.flush(cfg, p, s))(params, state)
  assert not done.levels.held_B.any()
  np.testing.assert_array_equal(done.levels.clock_B, state.levels.clock_B)
  for old, new in zip(state.levels.levels, done.levels.levels):
    before, after = levels_.weights(old), levels_.weights(new)
    assert np.abs(after.up_DxF - before.up_DxF)[:, 3].max() > 0
    assert list(new.commits_B - old.commits_B)[3] == 1


@pytest.mark.parametrize('differentiate', [slow('first_order'), 'full'])
def test_levels_learn_through_kernels(differentiate):
  # two chunks of the memory in a period
  tokens = jax.random.randint(jax.random.key(2), (1, 20), 0, V)

  def grads(implementation):
    memory = {'chunk_mem': 8, 'chunk_rest': 8, 'implementation': implementation}
    cms = {'periods': (16,), 'differentiate': differentiate}
    cms |= {'variant': 'sequential', 'optimizer': 'sgd'}
    cfg = config('hope', N=1, H=1, cms=cms, memory=memory)
    model = language_model.LanguageModel(cfg)
    boxed = jax.jit(model.init)(jax.random.key(0), None, tokens[:, :1])
    params = nn.unbox(boxed['params'])

    def loss(params):
      _, logits = model.apply({'params': params}, None, tokens)
      chance = jax.nn.log_softmax(logits[:, :-1])
      return -jnp.take_along_axis(chance, tokens[:, 1:, None], 2).mean()

    return jax.jit(jax.grad(loss))(params)

  jax.tree.map(close, grads('pallas'), grads('scan'))
