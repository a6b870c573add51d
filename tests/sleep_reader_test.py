"""The frozen reader reads as the model does, and learns nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sleep_cases as cases

from nestax.models import language_model, model_state
from nestax.sleep import reader as readers


def close(a, b, atol=2e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize(
  'family, blocks',
  [
    ('hope_attention', 'all'),
    pytest.param('hope', '1', marks=pytest.mark.slow),
  ],
)
def test_reads_as_the_model_does_until_a_level_would_commit(family, blocks):
  cfg = cases.config(family, blocks=blocks)
  params, B = cases.params_of(cfg), 2
  day = cases.day(cfg, B)
  model, reader = language_model.LanguageModel(cfg), readers.of_model(cfg)
  new = cases.tokens(B, 3, seed=2)  # the fastest period is 4
  read = jax.jit(reader.read)
  state = reader.fresh(readers.learned(day), B, 32)
  _, want = jax.jit(model.apply)({'params': params}, day, new)
  _, got = read(params, state, new)
  close(got, want)
  slow = read(params, reader.fresh(None, B, 32), new)[1]
  assert np.abs(slow - got).max() > 1e-4  # the levels had learned something


def test_nothing_is_learned_and_pieces_equal_the_whole():
  cfg = cases.config()
  params, B = cases.params_of(cfg), 2
  day = cases.day(cfg, B)
  reader, new = readers.of_model(cfg), cases.tokens(B, 20, seed=2)
  read = jax.jit(reader.read)
  state = reader.fresh(readers.learned(day), B, 32)
  whole, want = read(params, state, new)
  close(whole.written, state.written, atol=0)
  parts = []
  for a, b in ((0, 3), (3, 6), (6, 20)):
    state, part = read(params, state, new[:, a:b])
    parts.append(part)
  close(jnp.concatenate(parts, 1), want)


@pytest.mark.parametrize(
  'family',
  ['hope_attention', pytest.param('hope', marks=pytest.mark.slow)],
)
def test_rows_of_an_owner_read_with_what_the_owner_has_learned(family):
  cfg = cases.config(family)
  params, O, R = cases.params_of(cfg), 2, 3  # noqa: E741
  day = cases.day(cfg, O)
  context, reader = readers.learned(day), readers.of_model(cfg)
  new = cases.tokens(O * R, 6, seed=2)
  read = jax.jit(reader.read)
  state, got = read(params, reader.fresh(context, O * R, 32), new)
  each = jax.tree.map(lambda x: jnp.repeat(x, R, axis=1), context)
  want_state, want = read(params, reader.fresh(each, O * R, 32), new)
  close(got, want)
  close(state.mixers, want_state.mixers)
  # read once, with no state to go on from
  close(readers.scored(reader, params, context, new), got[:, :-1])


@pytest.mark.parametrize('blocks', ['all', '1'])
def test_gradients_of_scores_are_those_of_a_reading_that_goes_on(blocks):
  cfg = cases.config(blocks=blocks)
  params, B = cases.params_of(cfg), 2
  reader, context = readers.of_model(cfg), readers.learned(cases.day(cfg, B))
  new = cases.tokens(B, 7, seed=2)
  weight = np.linspace(-1, 1, cases.V)[None, None]

  def once(params):
    return (readers.score(reader, params, context, new) * weight).sum()

  def on(params):
    state = reader.fresh(context, B, 32)
    return (reader.read(params, state, new)[1][:, :-1] * weight).sum()

  got, want = jax.jit(lambda p: (jax.grad(once)(p), jax.grad(on)(p)))(params)
  close(got, want, atol=1e-4)


def test_rows_that_owners_cannot_share_are_refused():
  cfg = cases.config()  # of two blocks
  day = cases.day(cfg, 3)
  with pytest.raises(ValueError, match='4 rows .* 3 owners'):
    readers.of_model(cfg).fresh(readers.learned(day), 4, 8)


def test_fresh_rows_have_mixers_and_no_levels_of_their_own(monkeypatch):
  cfg = cases.config('hope_attention', blocks='all')
  want = model_state.init_state(cfg, 4, 8).blocks
  written = readers.learned(cases.day(cfg, 1))
  monkeypatch.setattr(model_state.level_state, 'init_state', None)
  rows = readers.of_model(cfg).fresh(written, 4, 8)
  assert rows.written is written
  jax.tree.map(np.testing.assert_array_equal, rows.mixers, want)


def test_ids_that_are_not_allowed_are_never_said():
  cfg = cases.config(blocks='none')
  params = cases.params_of(cfg)
  allowed = np.arange(cases.V) < 3
  prompts = readers.Said(cases.tokens(8, 12), jnp.full(8, 2), jnp.full(8, 2))
  reader = readers.of_model(cfg, allowed)
  said = jax.jit(functools.partial(readers.sample, reader))(
    params, None, prompts, jax.random.key(0)
  )
  assert (np.asarray(said.tokens_BxL)[np.asarray(said.said_BxL)] < 3).all()


def test_prompts_are_kept_and_rows_end_at_the_end_token():
  reader = cases.table_reader()
  # 1 -> 2 -> 3 (the end) -> 1
  table = 50.0 * jax.nn.one_hot(jnp.array([1, 2, 3, 1]), 4)
  tokens = jnp.array([[1, 0, 0, 0, 0, 0], [3, 3, 3, 0, 0, 0]])
  prompts = readers.Said(tokens, jnp.array([1, 3]), jnp.array([1, 3]))
  said = readers.sample(
    reader, table, None, prompts, jax.random.key(0), eos=3, pad=0
  )
  np.testing.assert_array_equal(
    said.tokens_BxL, [[1, 2, 3, 0, 0, 0], [3, 3, 3, 1, 2, 3]]
  )
  np.testing.assert_array_equal(said.length_B, [3, 6])
  np.testing.assert_array_equal(said.said_BxL.sum(1), [2, 3])


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_samples_are_drawn_from_the_models_distribution(temperature):
  reader, B = cases.table_reader(), 20_000
  chance = np.array([0.1, 0.2, 0.7])
  table = jnp.broadcast_to(jnp.log(chance), (3, 3))
  prompts = readers.Said(
    jnp.zeros((B, 3), jnp.int32), jnp.ones(B, int), jnp.ones(B, int)
  )
  said = readers.sample(
    reader, table, None, prompts, jax.random.key(0), temperature
  )
  flat = chance ** (1 / temperature)
  flat /= flat.sum()
  pairs = np.asarray(said.tokens_BxL) @ [0, 3, 1]
  share = np.bincount(pairs, minlength=9).reshape(3, 3) / B
  # the second token is drawn anew, whatever the first one was
  np.testing.assert_allclose(share, np.outer(flat, flat), atol=0.02)


def test_scores_are_those_the_sampler_saw():
  cfg = cases.config('hope')
  params, B = cases.params_of(cfg), 2
  day = cases.day(cfg, B)
  reader, context = readers.of_model(cfg), readers.learned(day)
  prompts = readers.Said(
    cases.tokens(B, 10, 3), jnp.array([1, 4]), jnp.array([1, 4])
  )
  said = jax.jit(
    lambda p: readers.sample(reader, params, context, p, jax.random.key(0), 0.0)
  )(prompts)
  score = jax.jit(lambda tokens: readers.score(reader, params, context, tokens))
  logits = score(said.tokens_BxL)
  first = np.asarray(logits.argmax(-1))
  mask = np.asarray(said.said_BxL)[:, 1:]
  np.testing.assert_array_equal(
    first[mask], np.asarray(said.tokens_BxL)[:, 1:][mask]
  )


@pytest.mark.parametrize(
  'family, blocks',
  [
    ('hope_attention', '1'),
    pytest.param('hope', 'all', marks=pytest.mark.slow),
  ],
)
def test_what_does_not_count_of_a_row_changes_no_state(family, blocks):
  cfg = cases.config(family, blocks=blocks)
  params, O = cases.params_of(cfg), 2  # noqa: E741
  context = readers.learned(cases.day(cfg, O))
  reader, new = readers.of_model(cfg), cases.tokens(4, 9, seed=2)
  read, fresh = (
    jax.jit(reader.read),
    jax.jit(reader.fresh, static_argnums=(1, 2)),
  )
  length = np.array([3, 9, 1, 3])  # few sizes, or each is compiled again
  state, padded = read(params, fresh(context, 4, 32), new, length)
  after = cases.tokens(4, 3, seed=5)
  _, got = read(params, state, after)
  for row, n in enumerate(length):
    whole = jnp.concatenate([new[row, :n], after[row]])[None]
    each = jax.tree.map(lambda x, o=row // 2: x[:, o : o + 1], context)
    _, want = read(params, fresh(each, 1, 32), whole)
    close(padded[row, :n], want[0, :n])
    close(got[row], want[0, n:])


def test_no_more_is_said_than_asked_for():
  reader = cases.table_reader()
  table = 50.0 * jax.nn.one_hot(jnp.array([1, 2, 0]), 3)  # 0 -> 1 -> 2 -> 0
  prompts = readers.Said(
    jnp.array([[0, 9, 9, 9, 9, 9], [0, 1, 2, 0, 1, 9]]),
    jnp.array([1, 5]),
    jnp.array([1, 5]),
  )
  said = readers.sample(
    reader, table, None, prompts, jax.random.key(0), pad=7, most=2
  )
  np.testing.assert_array_equal(
    said.tokens_BxL, [[0, 1, 2, 7, 7, 7], [0, 1, 2, 0, 1, 2]]
  )
  np.testing.assert_array_equal(said.length_B, [3, 6])
