"""llama2.c's .bin files: seven integers, then every weight in float32."""

import os

import numpy as np

from nestax.models.config import ModelConfig
from nestax.models.llama_files.layout import Weights

_MAGIC = 0x616B3432  # 'ak42', which opens versions 1 and later
_HEADER = 7  # int32: D, F, N, H, G, V (below 0: head of its own), length
_EPSILON = 1e-5  # llama2.c has it in its code, not in its files
_ROPE_BASE = 10_000.0  # likewise
# in the order of the file; each kind for all layers before the next kind
_ORDER = (
  'embed',
  'mixer_norm',
  'query',
  'key',
  'value',
  'out',
  'mlp_norm',
  'gate',
  'down',
  'up',
  'final_norm',
)


def open_file(path: str) -> Weights:
  """Opens a file of header version 0 (`legacy_export`).

  Raises:
    FileNotFoundError: if there is none.
    ValueError: in words, for another kind of file or one cut short.
  """
  size = os.path.getsize(path)
  header = np.fromfile(path, '<i4', _HEADER)
  if size < 4 * _HEADER:
    raise ValueError(f'{path} is too short for a llama2.c file: {size} bytes')
  if header[0] == _MAGIC:
    raise ValueError(
      f'{path} is a llama2.c file of version {header[1]}; only the legacy '
      'version 0 is read: export it again with --version 0'
    )
  D, F, N, H, G, V, length = (int(n) for n in header)
  likely = min(D, F, N, H, G, length) > 0 and V and not (D % H or H % G)
  # of no number that big could the file hold what it counts
  if not likely or D // H % 2 or max(D, F, N, abs(V), length) > size:
    raise ValueError(
      f'{path} is no llama2.c file, or cut short: its header says '
      f'{header.tolist()}, which is not a width, hidden width, layers, '
      'heads, key-value heads, vocabulary and length that fit together'
    )
  config = ModelConfig(
    family='transformer',
    V=abs(V),
    D=D,
    N=N,
    H=H,
    G=G,
    F=F,
    tied=V > 0,
    rope_base=_ROPE_BASE,
    epsilon=_EPSILON,
    dtype='float32',
  )
  return _weights(path, size, config, length)


def _weights(path: str, size: int, cfg: ModelConfig, length: int) -> Weights:
  places = _places(cfg, length)
  offset, shape = places['angles']
  end = offset + 4 * int(np.prod(shape))
  if not cfg.tied:
    offset, shape = places['head'] = (end, (cfg.V, cfg.D))
    end = offset + 4 * int(np.prod(shape))
  if size != end:
    raise ValueError(
      f'{path} has {size} bytes; a llama2.c file with its header has {end}: '
      f'it is {"cut short" if size < end else "of another kind"}'
    )

  def read(name):
    offset, shape = places[name]
    count = int(np.prod(shape))
    return np.fromfile(path, '<f4', count, offset=offset).reshape(shape)

  _check_angles(path, read('angles'), cfg)
  names = {role: role if role in places else role + '.{}' for role in _ORDER}
  shapes = {k: shape for k, (_, shape) in places.items() if k != 'angles'}
  return Weights(path, cfg, names | {'head': 'head'}, shapes, read, True)


def _places(cfg: ModelConfig, length: int) -> dict:
  """Offset in bytes and shape of each tensor, by role or role.layer."""
  D, F, K = cfg.D, cfg.F, cfg.head_width
  keys = cfg.kv_heads * K
  shapes = {
    'embed': (cfg.V, D),
    'final_norm': (D,),
    'mixer_norm': (D,),
    'query': (D, D),
    'key': (keys, D),
    'value': (keys, D),
    'out': (D, D),
    'mlp_norm': (D,),
    'gate': (F, D),
    'down': (D, F),
    'up': (F, D),
  }
  places, offset = {}, 4 * _HEADER
  for role in _ORDER:
    once = role in ('embed', 'final_norm')
    for i in range(1 if once else cfg.N):
      places[role if once else f'{role}.{i}'] = (offset, shapes[role])
      offset += 4 * int(np.prod(shapes[role]))
  places['angles'] = (offset, (2, length, K // 2))
  return places


def _check_angles(path: str, angles, cfg: ModelConfig) -> None:
  """The tables of cosines and sines must be those that we compute."""
  half = cfg.head_width // 2
  rate = cfg.rope_base ** (-np.arange(half) / half)
  angle = np.arange(angles.shape[1])[:8, None] * rate
  want = np.stack([np.cos(angle), np.sin(angle)])
  if not np.allclose(angles[:, :8], want, atol=1e-4):
    raise ValueError(
      f'{path}: its rotary angles are not those of base {cfg.rope_base:g}, '
      'which is all that llama2.c computes'
    )
