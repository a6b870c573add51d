"""The vision transformer and its digits."""

import sys

import jax
import numpy as np
import optax
import pytest

from nestax.launch.evals import contenders, sweep, vit
from nestax.optim import labels

MODEL = vit.VisionTransformer(D=8, N=1, H=2, F=16)


def draw(count=60, side=8):
  rng = np.random.default_rng(0)
  y = rng.integers(0, 10, count)
  x = rng.normal(size=(count, side, side))
  return x.astype(np.float32), y.astype(np.int32)


def test_patches_hold_the_pixels_of_their_place():
  x = np.arange(64.0).reshape(1, 8, 8)
  got = np.asarray(vit.patches(x))
  assert got.shape == (1, 16, 4)
  np.testing.assert_array_equal(got[0, 5], [18, 19, 26, 27])


def test_every_parameter_has_its_rule():
  x, _ = draw(1)
  params = jax.eval_shape(MODEL.init, jax.random.key(0), x)['params']
  names = labels.label(params, vit.RULES)
  found = jax.tree.leaves(names).count('matrix')
  assert found == 6 * MODEL.N


def test_it_learns_the_images_that_it_sees():
  task = vit.task(*draw(), MODEL, batch_size=40)
  shapes = jax.eval_shape(task.init, task.data, 0)
  make = contenders.make('m3', shapes, vit.RULES, lambda _: 1.0)
  rows = sweep.run(task, make, [0.02], 1, 30, 15)
  assert rows[1]['train'] < 0.9 * rows[0]['train']
  assert 0 <= rows[1]['test error'] <= 1


def test_no_image_is_in_two_parts():
  x, y = draw()
  data = vit.task(x, y, MODEL).data
  sizes = {name: len(part[1]) for name, part in data.items()}
  assert sizes == {'train': 40, 'valid': 10, 'test': 10}
  rows = np.concatenate([part[0].reshape(-1, 64) for part in data.values()])
  assert len(np.unique(rows, axis=0)) == 60


@pytest.mark.parametrize('kind', ['x.npz', 'train.npz', 'rows.csv'])
def test_files_of_the_user_are_read(kind, tmp_path):
  rng = np.random.default_rng(0)
  x, y = rng.integers(0, 255, (6, 28, 28)), np.arange(6)
  path = tmp_path / kind
  if kind == 'x.npz':
    np.savez(path, x=x, y=y)
  elif kind == 'train.npz':
    np.savez(path, x_train=x[:4], y_train=y[:4], x_test=x[4:], y_test=y[4:])
  else:
    rows = np.concatenate([y[:, None], x.reshape(6, -1)], axis=1)
    np.savetxt(path, rows, fmt='%d', delimiter=',')
  images, digits = vit.load(path)
  np.testing.assert_allclose(images, (x - x.mean()) / x.std(), rtol=1e-4)
  np.testing.assert_array_equal(digits, y)


def test_what_is_no_set_of_digits_is_said_in_words(tmp_path):
  np.savez(tmp_path / 'a.npz', pixels=np.zeros(3))
  with pytest.raises(vit.DataError, match='pixels: it needs x and y'):
    vit.load(tmp_path / 'a.npz')
  np.savez(tmp_path / 'b.npz', x=np.zeros((2, 9, 9)), y=np.zeros(2))
  with pytest.raises(vit.DataError, match='81 pixels'):
    vit.load(tmp_path / 'b.npz')


def test_without_scikit_learn_it_says_which_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sklearn', None)
  with pytest.raises(vit.DataError, match=r"pip install 'nestax\[eval\]'"):
    vit.load()


def test_digits_of_scikit_learn():
  pytest.importorskip('sklearn', reason='an extra: nestax[eval]')
  images, digits = vit.load()
  assert images.shape == (1797, 8, 8) and set(digits) == set(range(10))
  assert optax.global_norm(images.mean()) < 1e-4
