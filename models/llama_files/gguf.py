"""GGUF files (llama.cpp), quantised or not, read through the gguf package."""

import os

import numpy as np

from nestax.models.config import ModelConfig
from nestax.models.llama_files.layout import Weights

_MAGIC = b'GGUF'
# What the gguf package says of files that are newer than itself.
_NEWER = 'appears to be version', 'is not a valid GGMLQuantizationType'
_NAMES = {
  'embed': 'token_embd.weight',
  'final_norm': 'output_norm.weight',
  'head': 'output.weight',
  'mixer_norm': 'blk.{}.attn_norm.weight',
  'query': 'blk.{}.attn_q.weight',
  'key': 'blk.{}.attn_k.weight',
  'value': 'blk.{}.attn_v.weight',
  'out': 'blk.{}.attn_output.weight',
  'mlp_norm': 'blk.{}.ffn_norm.weight',
  'gate': 'blk.{}.ffn_gate.weight',
  'up': 'blk.{}.ffn_up.weight',
  'down': 'blk.{}.ffn_down.weight',
}
_ANGLES = 'rope_freqs.weight'  # factors on the angles: Llama 3's scaling
# What a key may say without changing what the model computes. Any other key
# of the architecture is refused: it might.
_HARMLESS = {
  'context_length': lambda value: True,
  'vocab_size': lambda value: True,
  'tensor_data_layout': lambda value: True,
  'rope.scaling.type': lambda value: value == 'none',
  'rope.scaling.factor': lambda value: value == 1,
  'rope.scale_linear': lambda value: value == 1,
  'rope.scaling.finetuned': lambda value: not value,
  'rope.scaling.original_context_length': lambda value: True,
  'expert_count': lambda value: value == 0,
  'expert_used_count': lambda value: value == 0,
}


def read(path: str):
  """Opens a file: gives a `gguf.GGUFReader`.

  Raises:
    FileNotFoundError: if there is none.
    ImportError: if the gguf package is missing.
    ValueError: in words, if it is no GGUF file, or one cut short.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f'{path}: there is no such file')
  try:
    import gguf
  except ImportError as error:
    raise ImportError(
      f"{path} needs the gguf package: pip install 'nestax[pretrained]'"
    ) from error
  with open(path, 'rb') as file:
    if file.read(len(_MAGIC)) != _MAGIC:
      raise ValueError(f'{path} is no GGUF file')
  try:
    return gguf.GGUFReader(path)
  # what numpy raises on a header that points past the end, among others
  except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as e:
    if any(words in str(e) for words in _NEWER):  # the others say nothing
      raise ValueError(f'the gguf package cannot read {path}: {e}') from e
    raise ValueError(
      f'{path} is a GGUF file cut short, or damaged: it has '
      f'{os.path.getsize(path):,} bytes'
    ) from e


def value(reader, key: str, default=None):
  """What the metadata say under `key`, or the default."""
  field = reader.get_field(key)
  return default if field is None else field.contents()


def open_file(path: str) -> Weights:
  """Opens a file of architecture 'llama'.

  Raises:
    FileNotFoundError, ImportError: as `read`.
    ValueError: in words, for what our Transformer++ cannot be: another
      architecture, experts, scaled rotary angles, biases.
  """
  reader = read(path)
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  if value(reader, 'split.count', 0) > 1:
    raise ValueError(
      f'{path} is one of {value(reader, "split.count")} parts; join them with '
      'llama-gguf-split --merge'
    )
  if _ANGLES in tensors:
    factors = dequantise(path, tensors.pop(_ANGLES))
    if not np.all(factors == 1):
      raise ValueError(
        f'{path}: {_ANGLES} scales the rotary angles (as Llama 3.1 does), '
        'which is not supported'
      )
  config = _config(path, reader, tensors)
  shapes = {name: _shape(tensor) for name, tensor in tensors.items()}

  def read_tensor(name):
    return dequantise(path, tensors[name])

  return Weights(path, config, _NAMES, shapes, read_tensor, True)


def _shape(tensor) -> tuple[int, ...]:
  return tuple(int(n) for n in tensor.shape[::-1])  # gguf has inputs first


def dequantise(path: str, tensor) -> np.ndarray:
  """A tensor of the reader as floats `[outputs, inputs]`, or a ValueError."""
  import gguf

  try:
    x = gguf.dequantize(tensor.data, tensor.tensor_type)
  except (NotImplementedError, ValueError) as error:
    raise ValueError(
      f'{path}: {tensor.name} is {tensor.tensor_type.name}, which the gguf '
      f'package does not dequantise: {error}'
    ) from error
  return x.reshape(_shape(tensor))


def _config(path: str, reader, tensors) -> ModelConfig:
  architecture = value(reader, 'general.architecture')
  if architecture != 'llama':
    raise ValueError(
      f"{path}: architecture {architecture!r}; only 'llama' is supported"
    )
  given = {
    key.removeprefix('llama.'): value(reader, key)
    for key in reader.fields
    if key.startswith('llama.')
  }

  def take(key, kind=int, default=None):
    found = given.pop(key, default)
    if found is None:
      raise ValueError(f'{path}: its metadata lack llama.{key}')
    if isinstance(found, bool) or not isinstance(found, int | kind):
      raise ValueError(
        f'{path}: llama.{key}={found!r}; a single {kind.__name__} is supported'
      )
    return found

  if _NAMES['embed'] not in tensors:
    raise ValueError(f'{path} lacks {_NAMES["embed"]}')
  H, D = take('attention.head_count'), take('embedding_length')
  K = take('attention.key_length', default=D // H if H else 0)
  for key in ('attention.value_length', 'rope.dimension_count'):
    if take(key, default=K) != K:
      raise ValueError(
        f'{path}: llama.{key} is not the head width {K}, which is not supported'
      )
  epsilon = take('attention.layer_norm_rms_epsilon', float)
  values = {
    'family': 'transformer',
    'V': _shape(tensors[_NAMES['embed']])[0],
    'D': D,
    'N': take('block_count'),
    'H': H,
    'K': K,
    'G': take('attention.head_count_kv', default=H),
    'F': take('feed_forward_length'),
    'window': take('attention.sliding_window', default=0),
    'rope_base': _decimal(take('rope.freq_base', float, 10_000.0)),
    'epsilon': _decimal(epsilon),
    'tied': _NAMES['head'] not in tensors,
    'dtype': 'float32',
  }
  for key, found in given.items():
    if key not in _HARMLESS or not _HARMLESS[key](found):
      raise ValueError(f'{path}: llama.{key}={found!r} is not supported')
  try:
    return ModelConfig.from_dict(values)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None


def _decimal(x: float) -> float:
  """The number that a float32 was written from: 1e-5, not 9.9999997e-06."""
  return float(str(np.float32(x)))
