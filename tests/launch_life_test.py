"""What a life carries: to disk and back, and each owner for themselves."""

import json

import jax
import jax.numpy as jnp
import nights_cases as cases
import numpy as np
import pytest

from nestax.launch import checkpoint, life
from nestax.models import model_state
from nestax.sleep.replay import Piece, Replay


def test_the_past_survives_json():
  past = life.Past(['ann', 'bob'], Replay(9), day=1, done={'ann': 3})
  past.replay.add(Piece('ann', (1, 2), 0.5, 'day 1'))
  past.earlier.add(Piece('bob', (3,), mark='night 1'))
  past.replay.add(Piece('bob', (3,)))
  past.forgotten.append('bob')
  new = life.Past([], Replay(1))
  new.set_state(json.loads(past.get_state()))
  assert new.replay.rows() == past.replay.rows()
  assert new.earlier.rows() == past.earlier.rows()
  assert (new.day, new.done, new.present) == (1, {'ann': 3}, ['ann'])


def born(B):
  made = cases.made()
  state = model_state.init_state(made.model.cfg, B, 8)
  return state, jnp.zeros((B, made.model.cfg.V))


def read(state, logits, tokens, reads_B):
  made = cases.made()
  copies = jax.tree.map(jnp.copy, (state, logits))  # they are used up
  return life.read(
    made.model, made.params, *copies, jnp.asarray(tokens), jnp.asarray(reads_B)
  )


def test_who_does_not_read_stays_as_they_are_to_the_bit():
  tokens = np.random.default_rng(0).integers(97, 100, (2, 8))
  all_B, first_B = np.array([True, True]), np.array([True, False])
  state, logits, _ = read(*born(2), tokens, all_B)
  later, after, _ = read(state, logits, tokens, first_B)
  for name in ('clock_B', 'held_B', 'skip_B', 'surprise_B'):
    new, old = (getattr(s.levels, name) for s in (later, state))
    assert new[1] == old[1]
  assert later.levels.clock_B.tolist() == [16, 8]
  for new, old in zip(
    jax.tree.leaves((later.blocks, later.levels.boundary)),
    jax.tree.leaves((state.blocks, state.levels.boundary)),
  ):
    np.testing.assert_array_equal(new[:, 1], old[:, 1])
  for new, old in zip(later.levels.levels, state.levels.levels):
    for a, b in zip(new.delta, old.delta):
      np.testing.assert_array_equal(a[:, 1], b[:, 1])
      assert (a[:, 0] != b[:, 0]).any()
  for new, old in zip(later.levels.held, state.levels.held):
    np.testing.assert_array_equal(new[1], old[1])
  np.testing.assert_array_equal(after[1], logits[1])


def test_every_token_is_paid_for_once_wherever_calls_are_cut():
  tokens = np.random.default_rng(1).integers(97, 100, (1, 12))
  one_B = np.array([True])
  _, _, whole = read(*born(1), tokens, one_B)
  being, total = born(1), 0.0
  for a, b in ((0, 5), (5, 6), (6, 7), (7, 12)):
    *being, nats = read(*being, tokens[:, a:b], one_B)
    total += float(nats[0].sum())
  np.testing.assert_allclose(total, float(whole[0].sum()), rtol=1e-5)
  # before anything is read every id is as likely as another
  _, _, first = read(*born(1), tokens[:, :1], one_B)
  np.testing.assert_allclose(first[0, 0], np.log(272), rtol=1e-5)


def test_another_model_in_a_folder_is_told_to_take_another_out(tmp_path):
  being = life.Being(cases.made().params, None, np.zeros((1, 1)))
  past = life.Past([], Replay(2))
  store = life.Store(tmp_path, cases.made(), cases.OPTIONS, print)
  store.save(being, past)
  store.close()
  store = life.Store(tmp_path, cases.made(slots=4), cases.OPTIONS, print)
  words = 'cms.slots is 8 there and 4 here.*or another --out'
  with pytest.raises(checkpoint.OtherConfigError, match=words):
    store.restore(being, past)
  store.close()
