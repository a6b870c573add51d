"""Dreams: sampled with an extra expert, chosen, isolated, paid, imitated."""

import dataclasses
import functools

import dream_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sleep_cases

from nestax.sleep import dream, grow
from nestax.sleep import reader as readers


def dreams_of(programs, params=None, key=0):
  params = cases.table() if params is None else params
  zeros = jnp.zeros((cases.W, cases.W))
  return programs.dream(
    params, None, zeros, cases.prompt(), jax.random.key(key)
  )


def test_later_dreams_are_dreamt_with_what_was_learned():
  programs = cases.made()
  twos = jnp.full(cases.W, 2)  # comes after everything
  learned = 99 * jax.nn.one_hot(twos, cases.W)
  said = programs.dream(
    cases.table(), None, learned, cases.prompt(), jax.random.key(0)
  )
  assert (said.tokens_BxL[:, 2:] == 2).all()


def test_isolated_copies_are_those_made_one_by_one():
  programs = cases.made()
  dreams = dreams_of(programs)
  first = 0.1 * cases.table(1)
  got = programs.adapt(cases.table(), None, first, dreams)
  for i in range(3):
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], dreams)
    want = programs.adapt(cases.table(), None, first, one)[0]
    np.testing.assert_allclose(got[i], want, atol=1e-5)
  assert (got[0] != got[1]).any()


def scored(text):
  """The loss of a text as a function of what is learned."""

  def loss(trained):
    params, reader = cases.table() + trained, sleep_cases.table_reader()
    return -dream.row_scores(reader, params, None, text)[0]

  return loss


def test_a_copy_learns_its_dream_by_adam():
  programs = cases.made()
  dreams = jax.tree.map(lambda x: x[:1], dreams_of(programs))
  loss = scored(dream.alone(dreams, cases.BOS))
  first = want = 0.1 * cases.table(1)
  got = programs.adapt(cases.table(), None, first, dreams)[0]
  adam = optax.adam(cases.CFG.inner_rate)
  state = adam.init(want)
  for _ in range(cases.CFG.inner_steps):
    updates, state = adam.update(jax.grad(loss)(want), state)
    want = optax.apply_updates(want, updates)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_score_is_a_mean_over_what_is_said():
  texts = readers.Said(
    jnp.zeros((3, 6), int), jnp.array([1, 2, 3]), jnp.array([6, 4, 3])
  )
  flat = jnp.zeros((cases.W, cases.W))
  got = dream.row_scores(sleep_cases.table_reader(), flat, None, texts)
  want = -np.log(cases.W)
  np.testing.assert_allclose(got, [want, want, 0.0], rtol=1e-5)


def test_rows_that_hold_no_question_do_not_count():
  programs = dream.programs(
    cases.CFG,
    sleep_cases.table_reader(),
    cases.add,
    cases.same,
    cases.BOS,
    score=lambda *asked: jnp.array([0.2, 0.4, 9.0]),
  )
  own = jnp.zeros((1, cases.W, cases.W))
  got = programs.examine(cases.table(), None, own, cases.prompt(), 2)
  np.testing.assert_allclose(got, [0.3], rtol=1e-5)


def test_imitation_moves_by_its_rate_and_is_compiled_once():
  programs = cases.made()
  put = lambda x: jax.device_put(x, jax.devices()[0])  # noqa: E731
  params, trained = put(cases.table()), put(jnp.zeros((cases.W, cases.W)))
  dreams, paid = dreams_of(programs, params), jnp.ones(cases.CFG.dreams)
  opt_state = programs.begin(trained)
  given = params, None, trained, opt_state, dreams, paid
  one, opt_state = programs.study(*given)  # Adam moves by the rate itself
  np.testing.assert_allclose(jnp.abs(one).max(), cases.CFG.rate, rtol=1e-3)
  programs.study(params, None, one, opt_state, dreams, paid)
  assert programs.study._cache_size() == 1


def test_dreams_are_weighed_by_their_own_gradients():
  programs = cases.made()
  dreams = dreams_of(programs)
  zeros = jnp.zeros((cases.W, cases.W))
  omega = programs.weigh(cases.table(), None, zeros, dreams)
  texts = dream.alone(dreams, cases.BOS)
  for i in (0, 5):
    loss = scored(jax.tree.map(lambda x, i=i: x[i : i + 1], texts))
    want = jnp.linalg.norm(jax.grad(loss)(zeros))
    np.testing.assert_allclose(omega[i], want, rtol=1e-4)


def test_every_dream_has_a_disturbance_of_its_own():
  def always(params, key):  # one word, a random one, after every other
    word = jax.random.randint(key, (), 0, 4)
    return params + 99 * jax.nn.one_hot(word, cases.W)[None]

  said = dreams_of(cases.made(disturb=always)).tokens_BxL[:, 2:]
  assert (said == said[:, :1]).all()
  assert len(np.unique(said)) > 1


def test_a_dream_alone_has_left_its_context():
  texts = readers.Said(
    jnp.array([[9, 9, 1, 2, 3, 0]]), jnp.array([2]), jnp.array([5])
  )
  alone = dream.alone(texts, cases.BOS)
  assert alone.tokens_BxL[0, :4].tolist() == [cases.BOS, 1, 2, 3]
  assert (int(alone.start_B[0]), int(alone.length_B[0])) == (1, 4)


def test_one_expert_more_is_active_in_every_block_that_has_any():
  cfg, params = cases.slotted()
  seen = set()
  disturb = jax.jit(functools.partial(dream.random_expert, cfg))
  for i in range(12):
    other = disturb(params, jax.random.key(i))
    for k in (0, 1):
      was, now = (grow.slots(cfg, p, k) for p in (params, other))
      doubled = bool((now.b_SxRxD == 2 * was.b_SxRxD)[:, 0].all())
      shown = bool((now.active_S[:, 1] == 1).all())
      assert doubled != shown  # one of the two, never both
      assert not now.active_S[:, 2].any()  # the empty one stays out
      seen.add(doubled)
    kernels = [p['blocks']['level_0']['down'] for p in (other, params)]
    np.testing.assert_array_equal(*kernels)
  assert seen == {True, False}


def test_where_all_slots_are_empty_nothing_is_added():
  cfg = sleep_cases.config(blocks='1', slots=3, rank=2)
  params = sleep_cases.params_of(cfg)
  other = dream.random_expert(cfg, params, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params, other)


@pytest.mark.parametrize(
  'values, words',
  [
    ({'dreams': 3}, 'top=4 and random=2'),
    ({'rounds': 0}, 'rounds=0'),
    ({'temperature': 0.0}, 'temperature=0.0'),
    ({'margin': float('nan')}, 'margin=nan'),
  ],
  ids=['few', 'rounds', 'temperature', 'margin'],
)
def test_impossible_settings_are_refused_in_words(values, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(cases.CFG, **values)
