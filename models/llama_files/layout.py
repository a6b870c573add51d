"""What a file of Llama-type weights must hold, and how it becomes ours."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from nestax.models.config import DTYPES, ModelConfig

# Tensors by role; a file has them as [outputs, inputs], we as [inputs, ...].
WHOLE = ('embed', 'final_norm', 'head')
LAYER = {
  'mixer_norm': ('mixer_norm', 'scale'),
  'query': ('mixer', 'query', 'kernel'),
  'key': ('mixer', 'key', 'kernel'),
  'value': ('mixer', 'value', 'kernel'),
  'out': ('mixer', 'out', 'kernel'),
  'mlp_norm': ('level_0', 'norm', 'scale'),
  'gate': ('level_0', 'gate'),
  'up': ('level_0', 'up'),
  'down': ('level_0', 'down'),
}


class Weights(NamedTuple):
  """A file of weights, opened: its header has been read, its tensors not yet.

  Attributes:
    source: the file's name, for messages.
    config: of the model, family 'transformer'.
    names: the file's name of each role; `{}` stands for the layer's number.
    shapes: shape of every tensor in the file by name, `[outputs, inputs]`.
    read: gives a tensor by name, as an array of floats of any width.
    interleaved: RoPE's pairs are rows (2i, 2i + 1) of each head of query and
      key, as in Meta's own files; else (i, i + K/2), which is our way.
  """

  source: str
  config: ModelConfig
  names: Mapping[str, str]
  shapes: Mapping[str, tuple[int, ...]]
  read: Callable[[str], np.ndarray]
  interleaved: bool


def params(weights: Weights, dtype: str) -> dict:
  """Reads all tensors into our parameters, one at a time.

  Args:
    weights: the file.
    dtype: of the result, a key of config.DTYPES.

  Returns:
    Nested dict of numpy arrays, layers stacked on a leading axis in `blocks`.

  Raises:
    ValueError: naming tensors that are missing, left over, of another shape
      or not finite.
  """
  cfg = weights.config
  check(weights)

  def take(role, i=0):
    name = weights.names[role].format(i)
    return _ours(role, _read(weights, name), cfg, weights.interleaved)

  def cast(x):
    return np.ascontiguousarray(x).astype(DTYPES[dtype])

  blocks: dict = {}
  for role, path in LAYER.items():
    first = take(role)
    stack = np.empty((cfg.N, *first.shape), DTYPES[dtype])
    stack[0] = first
    for i in range(1, cfg.N):
      stack[i] = take(role, i)
    inner = blocks
    for key in path[:-1]:
      inner = inner.setdefault(key, {})
    inner[path[-1]] = stack
  made = {
    'embed': {'embedding': cast(take('embed'))},
    'blocks': blocks,
    'final_norm': {'scale': cast(take('final_norm'))},
  }
  return made if cfg.tied else made | {'head': cast(take('head'))}


def check(weights: Weights) -> None:
  """Raises a ValueError in words if the tensors are not those of the config."""
  want = _wanted(weights)
  missing = [name for name in want if name not in weights.shapes]
  if missing:
    raise ValueError(f'{weights.source} lacks {_some(missing)}')
  extra = [name for name in weights.shapes if name not in want]
  biases = [name for name in extra if name.endswith('.bias')]
  if biases:
    raise ValueError(
      f'{weights.source} holds biases, which our layers do not have: '
      f'{_some(biases)}'
    )
  if extra:
    raise ValueError(
      f'{weights.source} holds tensors that a Llama of {weights.config.N} '
      f'layers has not: {_some(extra)}'
    )
  for name, shape in want.items():
    if tuple(weights.shapes[name]) != shape:
      raise ValueError(
        f'{weights.source}: {name} is {list(weights.shapes[name])}; with the '
        f'sizes that the file gives it should be {list(shape)}'
      )


def _wanted(weights: Weights) -> dict[str, tuple[int, ...]]:
  cfg = weights.config
  D, F, K = cfg.D, cfg.F, cfg.head_width
  queries, keys = cfg.H * K, cfg.kv_heads * K
  shapes = {
    'embed': (cfg.V, D),
    'final_norm': (D,),
    'head': (cfg.V, D),
    'mixer_norm': (D,),
    'query': (queries, D),
    'key': (keys, D),
    'value': (keys, D),
    'out': (D, queries),
    'mlp_norm': (D,),
    'gate': (F, D),
    'up': (F, D),
    'down': (D, F),
  }
  whole = [role for role in WHOLE if role != 'head' or not cfg.tied]
  wanted = {weights.names[role]: shapes[role] for role in whole}
  for i in range(cfg.N):
    for role in LAYER:
      wanted[weights.names[role].format(i)] = shapes[role]
  return wanted


def _some(names: list[str]) -> str:
  rest = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + rest


def _read(weights: Weights, name: str) -> np.ndarray:
  x = np.asarray(weights.read(name), np.float32)
  if not np.isfinite(x).all():
    raise ValueError(f'{weights.source}: {name} holds numbers not finite')
  return x


def _ours(role: str, x, cfg: ModelConfig, interleaved: bool) -> np.ndarray:
  K = cfg.head_width
  if role in ('query', 'key', 'value'):
    x_HxKxD = x.reshape(-1, K, cfg.D)
    if interleaved and role != 'value':
      pairs = x_HxKxD.reshape(-1, K // 2, 2, cfg.D)
      x_HxKxD = pairs.swapaxes(1, 2).reshape(x_HxKxD.shape)
    return x_HxKxD.transpose(2, 0, 1)
  if role == 'out':
    return x.T.reshape(cfg.H, K, cfg.D)
  return x if role == 'embed' else x.T
