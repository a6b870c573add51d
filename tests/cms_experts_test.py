"""Expert slots: growth without change, exact resets, honest folding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nestax.cms import experts
from nestax.cms.level import Theta

S, D, R, B, L = 3, 8, 2, 2, 5
DTYPES = [jnp.float32, jnp.bfloat16]


def empty(leading=(), seed=0):
  return experts.init(jax.random.key(seed), S, D, R, leading)


def full(leading=(), seed=1, active=(1, 0, 1)):
  """Slots that hold something, some of them masked."""
  keys = jax.random.split(jax.random.key(seed), 2)
  slots = empty(leading, seed)
  return slots._replace(
    b_SxRxD=jax.random.normal(keys[0], slots.b_SxRxD.shape),
    logit_S=jax.random.normal(keys[1], slots.logit_S.shape),
    active_S=jnp.broadcast_to(jnp.array(active, jnp.float32), (*leading, S)),
  )


def inputs(seed=2):
  return jax.random.normal(jax.random.key(seed), (B, L, D))


def plain(slots, x_TxD):
  """The definition, a loop."""
  y = np.zeros_like(x_TxD)
  for a, b, logit, active in zip(*map(np.asarray, slots)):
    if active:
      y += 2 / (1 + np.exp(-logit)) * (x_TxD @ a) @ b
  return y


def test_reads_the_sum_over_active_slots():
  slots, x = full(), inputs()
  want = np.stack([plain(slots, row) for row in np.asarray(x)])
  got = experts.read(slots, x, jnp.float32)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_owners_read_their_own_slots():
  slots, x = full((B,)), inputs()
  got = experts.read(slots, x, jnp.float32)
  for i in range(B):
    own = jax.tree.map(lambda s, i=i: s[i], slots)
    np.testing.assert_allclose(got[i], plain(own, np.asarray(x[i])), atol=1e-5)


def test_an_owner_does_not_see_another_ones_slots():
  slots, x = full((B,)), inputs()
  other = slots._replace(b_SxRxD=slots.b_SxRxD.at[1].add(1.0))
  read = jax.jit(experts.read, static_argnums=2)
  a, b = read(slots, x, jnp.float32), read(other, x, jnp.float32)
  np.testing.assert_array_equal(a[0], b[0])
  assert (a[1] != b[1]).any()


def test_a_slot_weighs_exactly_one_at_birth():
  assert (experts.weights(experts.activate(empty(), 1))[1] == 1.0).all()


@pytest.mark.parametrize('dtype', DTYPES, ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('leading', [(), (B,)], ids=['shared', 'owner'])
def test_growth_changes_no_bit(leading, dtype):
  # slot 1 holds leftovers, which must not come back
  slots, x = full(leading), inputs()
  read = jax.jit(experts.read, static_argnums=2)
  grown = experts.activate(slots, 1)
  assert (grown.active_S == 1).all()
  before, after = read(slots, x, dtype), read(grown, x, dtype)
  view = np.uint16 if dtype == jnp.bfloat16 else np.uint32
  np.testing.assert_array_equal(
    np.asarray(before).view(view), np.asarray(after).view(view)
  )


def test_a_masked_slot_adds_nothing_whatever_it_holds():
  slots, x = full(), inputs()
  worst = jnp.array([0.0, jnp.nan, 0.0])
  bad = slots._replace(
    a_SxDxR=slots.a_SxDxR + worst[:, None, None],
    b_SxRxD=slots.b_SxRxD + worst[:, None, None],
    logit_S=slots.logit_S + worst,
  )
  got = experts.read(bad, x, jnp.float32)
  np.testing.assert_array_equal(got, experts.read(slots, x, jnp.float32))


def test_masked_slots_and_the_mask_get_no_gradient():
  slots, x = full(), inputs()

  def loss(slots):
    return jnp.square(experts.read(slots, x, jnp.float32)).sum()

  grads = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(slots))
  assert not grads.active_S.any()
  for name, grad in grads._asdict().items():
    assert not grad[1].any(), name
  for grad in (grads.a_SxDxR, grads.b_SxRxD, grads.logit_S):
    assert grad[0].any() and grad[2].any()


@pytest.mark.parametrize('leading', [(), (2,), (2, B)], ids=str)
def test_freeing_is_exact(leading):
  slots = full(leading, active=(1, 1, 0))
  key = jax.random.key(7)
  freed = experts.free(slots, jnp.array([True, False, False]), key)
  fresh = experts.init(key, S, D, R, leading)

  def at(x, i):
    return np.take(np.asarray(x), i, axis=len(leading))

  for new, was, now in zip(fresh, slots, freed):
    np.testing.assert_array_equal(at(now, 0), at(new, 0))
    np.testing.assert_array_equal(at(now, 1), at(was, 1))
    np.testing.assert_array_equal(at(now, 2), at(was, 2))


def test_the_first_spare_slot_is_spare_in_every_block():
  slots = empty((2,))
  assert experts.spare(slots) == 0
  active = jnp.array([[1.0, 0, 0], [0, 1.0, 0]])
  assert experts.spare(slots._replace(active_S=active)) == 2


def test_used_up_slots_are_refused_in_words():
  slots = full(active=(1, 1, 1))
  with pytest.raises(experts.SlotsError, match='all 3 expert slots.*merge'):
    experts.spare(slots)


@pytest.mark.parametrize('S, r', [(0, 2), (2, 0), (2, 9)])
def test_impossible_slots_are_refused_in_words(S, r):
  with pytest.raises(experts.SlotsError, match=f'{S} slots of rank {r}'):
    experts.init(jax.random.key(0), S, D, r)


def level(F, seed=3):
  keys = jax.random.split(jax.random.key(seed), 3)
  return Theta(
    jax.random.normal(keys[0], (D, F)) * D**-0.5,
    jax.random.normal(keys[1], (D, F)) * D**-0.5,
    jax.random.normal(keys[2], (F, D)) * F**-0.5,
  )


def told(theta, x_TxD):
  return experts.hidden(theta, x_TxD) @ theta.down_FxD


@pytest.mark.parametrize('F', [8, 64])
def test_folding_reports_what_is_missing(F):
  theta, slots = level(F), full()
  keys = jax.random.split(jax.random.key(4), 2)
  x, held = (jax.random.normal(k, (1024, D)) for k in keys)
  done = experts.fold(theta, slots, x, held)
  want = told(theta, held) + plain(slots, np.asarray(held))
  miss = np.linalg.norm(told(done.theta, held) - want)
  miss /= np.linalg.norm(plain(slots, np.asarray(held)))
  np.testing.assert_allclose(done.error, miss, rtol=1e-3)
  np.testing.assert_array_equal(done.theta.gate_DxF, theta.gate_DxF)
  np.testing.assert_array_equal(done.theta.up_DxF, theta.up_DxF)


def test_a_wider_level_takes_up_more():
  slots = full()
  keys = jax.random.split(jax.random.key(4), 2)
  x, held = (jax.random.normal(k, (2048, D)) for k in keys)
  narrow, wide = (
    experts.fold(level(F), slots, x, held).error for F in (8, 256)
  )
  assert wide < 0.5 < narrow < 1.01


def test_folding_nothing_changes_nothing():
  theta, x = level(16), inputs()[0]
  done = experts.fold(theta, empty(), x, x)
  assert done.error == 0
  jax.tree.map(np.testing.assert_array_equal, done.theta, theta)
