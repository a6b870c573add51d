"""A small vision transformer on digits of 8 x 8 or 28 x 28 pixels."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nestax.launch.evals.sweep import Task

RULES = (
  (r'block_\d+/(query|key|value|out|up|down)/kernel', 'matrix'),
  (r'block_\d+/(query|key|value|out|up|down)/bias', 'rest'),
  (r'(block_\d+/)?norm_\w+/(scale|bias)', 'rest'),
  (r'(embed|head)/(kernel|bias)|positions', 'rest'),
)
SIDE = 4  # patches along each side of an image


class DataError(ValueError):
  """Images cannot be had, or are not what they should be."""


class Block(nn.Module):
  """Attention without a mask and an MLP, pre-norm."""

  H: int
  F: int

  @nn.compact
  def __call__(self, x_BxLxD):
    *batch, width = x_BxLxD.shape
    heads = (*batch, self.H, width // self.H)
    y = nn.LayerNorm(name='norm_mixer')(x_BxLxD)
    q, k, v = (
      nn.Dense(width, name=name)(y).reshape(heads)
      for name in ('query', 'key', 'value')
    )
    y = jax.nn.dot_product_attention(q, k, v).reshape(x_BxLxD.shape)
    x_BxLxD = x_BxLxD + nn.Dense(width, name='out')(y)
    y = nn.LayerNorm(name='norm_mlp')(x_BxLxD)
    y = jax.nn.gelu(nn.Dense(self.F, name='up')(y))
    return x_BxLxD + nn.Dense(width, name='down')(y)


class VisionTransformer(nn.Module):
  """Patches in, mean over patches out; 10 classes."""

  D: int = 64
  N: int = 4
  H: int = 4
  F: int = 256

  @nn.compact
  def __call__(self, image_BxSxS):
    x_BxLxD = nn.Dense(self.D, name='embed')(patches(image_BxSxS))
    shape = (1, *x_BxLxD.shape[1:])
    x_BxLxD += self.param('positions', nn.initializers.normal(0.02), shape)
    for i in range(self.N):
      x_BxLxD = Block(self.H, self.F, name=f'block_{i}')(x_BxLxD)
    x_BxD = nn.LayerNorm(name='norm_final')(x_BxLxD).mean(axis=1)
    return nn.Dense(10, name='head')(x_BxD)


def patches(image_BxSxS):
  """Cuts images into 4 x 4 patches, `[B, 16, pixels]`."""
  batch, side, _ = image_BxSxS.shape
  cut = side // SIDE
  x = image_BxSxS.reshape(batch, SIDE, cut, SIDE, cut).swapaxes(2, 3)
  return x.reshape(batch, SIDE * SIDE, cut * cut)


def load(path: str | os.PathLike = '') -> tuple[np.ndarray, np.ndarray]:
  """Reads digits: scikit-learn's, or a file of the user's.

  Args:
    path: '' for scikit-learn; a `.npz` with `x` and `y` or with `x_train`,
      `y_train`, `x_test`, `y_test`; or a CSV with the label first.

  Returns:
    Images `[count, side, side]`, float32, mean 0 and deviation 1 over all,
    and labels int32.

  Raises:
    DataError: if scikit-learn is not installed or the file is something else.
    FileNotFoundError: if there is no such file.
  """
  x, y = _read(str(path)) if path else _digits()
  side = round(x[0].size ** 0.5)
  if side**2 != x[0].size or side % SIDE:
    raise DataError(
      f'images of {x[0].size} pixels: they have to be square, with a side '
      f'that {SIDE} divides'
    )
  x = x.reshape(len(x), side, side).astype(np.float32)
  return (x - x.mean()) / x.std(), y.astype(np.int32)


def task(
  images: np.ndarray,
  labels: np.ndarray,
  model: VisionTransformer,
  batch_size: int = 128,
) -> Task:
  """Splits images 4 : 1 : 1 into training, validation and test, at random.

  Args:
    images: `[count, side, side]` float32.
    labels: `[count]` int32, 0 to 9.
    model: the network.
    batch_size: images a step, drawn anew at each.
  """
  order = np.random.default_rng(0).permutation(len(images))
  cuts = [len(order) * 4 // 6, len(order) * 5 // 6]
  data = {
    name: (jnp.asarray(images[part]), jnp.asarray(labels[part]))
    for name, part in zip(('train', 'valid', 'test'), np.split(order, cuts))
  }

  def init(data, seed):
    return model.init(jax.random.key(seed), data['train'][0][:1])['params']

  def batch(data, seed, step):
    key = jax.random.fold_in(jax.random.key(seed), step)
    chosen = jax.random.randint(key, (batch_size,), 0, len(data['train'][1]))
    return tuple(x[chosen] for x in data['train'])

  def measure(params, batch):
    logits_BxC = model.apply({'params': params}, batch[0])
    nats_B = optax.softmax_cross_entropy_with_integer_labels(
      logits_BxC, batch[1]
    )
    return nats_B.mean(), jnp.mean(logits_BxC.argmax(-1) != batch[1])

  def evaluate(data, params, seed, step):
    del seed, step
    valid, _ = measure(params, data['valid'])
    test, wrong = measure(params, data['test'])
    return {'valid loss': valid, 'test loss': test, 'test error': wrong}

  def loss(params, batch):
    return measure(params, batch)[0]

  return Task(data, init, batch, loss, evaluate, 'valid loss')


def _digits():
  try:
    from sklearn import datasets
  except ImportError as error:
    raise DataError(
      'the digits come from scikit-learn, which is not installed: pip install '
      "'nestax[eval]', or name a file of images (--images)"
    ) from error
  digits = datasets.load_digits()
  return digits.images, digits.target


def _read(path):
  if path.endswith('.csv'):
    rows = np.loadtxt(path, delimiter=',', ndmin=2)
    return rows[:, 1:], rows[:, 0]
  with np.load(path) as arrays:
    names = ('x', 'y')
    if all(name in arrays for name in names):
      return tuple(arrays[name] for name in names)
    parts = [f'{n}_{s}' for n in names for s in ('train', 'test')]
    if not all(part in arrays for part in parts):
      raise DataError(
        f'{path} holds {", ".join(arrays)}: it needs x and y, or '
        + ', '.join(parts)
      )
    x, x_test, y, y_test = (arrays[part] for part in parts)
    return np.concatenate([x, x_test]), np.concatenate([y, y_test])
