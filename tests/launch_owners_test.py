"""An owner's own model out of a life's checkpoint, for other commands."""

import functools

import jax
import jax.numpy as jnp
import nights_cases as cases
import numpy as np
import pytest

from nestax.launch import generate, life, trained
from nestax.launch.evals import novel
from nestax.models import model_state
from nestax.sleep.replay import Replay

NOBODY = novel.Stack('', (), 'all', 0.1)


@functools.cache
@jax.jit
def grown():
  """The state of two owners with slots in use, of their own each."""
  cfg = cases.made(scope='owner').model.cfg
  state = model_state.init_state(cfg, 2, cases.OPTIONS.window)
  owned = [
    slots._replace(
      b_SxRxD=jax.random.normal(jax.random.key(i), slots.b_SxRxD.shape),
      active_S=jnp.ones_like(slots.active_S),
    )
    for i, slots in enumerate(state.owned)
  ]
  return state._replace(owned=tuple(owned))


def saved(folder, scope, past):
  made = cases.made(scope=scope)
  state = grown() if scope == 'owner' else None
  folder.mkdir()
  store = life.Store(folder, made, cases.OPTIONS, print)
  store.save(
    life.Being(made.params, state, np.zeros((2, made.model.cfg.V))), past
  )
  store.close()
  return folder


@pytest.fixture(scope='module')
def apart(tmp_path_factory):
  past = life.Past(['ann', 'bob'], Replay(2))
  return saved(tmp_path_factory.mktemp('owners') / 'out', 'owner', past)


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, state, tokens):
  return model.apply({'params': params}, state, tokens)[1]


def logits(made, state=None):
  tokens = jnp.asarray(np.random.default_rng(0).integers(97, 100, (1, 6)))
  state = state or model_state.init_state(made.model.cfg, 1, 8)
  return read(made.model, made.params, state, tokens)


def test_an_owner_reads_with_slots_of_their_own(apart):
  plain, bob = trained.load(apart), trained.load(apart, owner='bob')
  assert cases.same(plain.params, cases.made(scope='owner').params)
  row = model_state.take_row(grown(), 1)
  want = logits(plain, row)  # as the life itself reads with the state
  np.testing.assert_allclose(logits(bob), want, atol=1e-6)
  others = logits(trained.load(apart, owner='ann')), logits(plain)
  assert all(np.abs(other - want).max() > 1e-3 for other in others)
  evaluated = novel.load(apart, None, NOBODY, owner='bob')
  assert cases.same(evaluated.params, bob.params)


def test_who_is_not_there_is_refused_and_who_is_is_named(apart, tmp_path):
  with pytest.raises(ValueError, match='--owner=eve: .*; there are ann, bob'):
    trained.load(apart, owner='eve')
  past = life.Past(['ann', 'bob'], Replay(2), forgotten=['ann'])
  left = saved(tmp_path / 'left', 'owner', past)
  with pytest.raises(ValueError, match='--owner=ann: .*; there are bob$'):
    trained.load(left, owner='ann')
  bob, before = (trained.load(x, owner='bob') for x in (left, apart))
  assert cases.same(bob.params, before.params)  # the same row as before
  shared = saved(tmp_path / 'shared', 'shared', life.Past(['ann'], Replay(2)))
  with pytest.raises(ValueError, match='nobody has slots of their own in'):
    trained.load(shared, owner='ann')
  for load in (
    lambda: trained.choose(None, 'x.gguf', 'ann'),
    lambda: novel.load(None, 'stories.bin', NOBODY, owner='ann'),
  ):
    with pytest.raises((ValueError, OSError), match='--owner=ann goes with'):
      load()


def test_the_command_takes_an_owners_slots(apart, monkeypatch, capsys):
  taken = []

  def text(model, params, *how):
    taken.append(params)
    return iter(['!'])

  monkeypatch.setattr(generate.sampling, 'text', text)

  def run(owner):
    for name in generate.FLAGS:  # of an earlier call
      generate.FLAGS[name].unparse()
    words = ['', f'--workdir={apart}', f'--owner={owner}', '--prompt=a']
    return generate.main(generate.FLAGS(words))

  assert run('bob') == 0
  assert capsys.readouterr().out == 'a!\n'
  (params,) = taken
  assert cases.same(params, trained.load(apart, owner='bob').params)
  assert run('eve') == 2
  said = capsys.readouterr()
  assert 'there are ann, bob' in said.err and not said.out
