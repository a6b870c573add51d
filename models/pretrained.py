"""Llama-type models from files: weights in, a config and parameters out."""

import os
from typing import NamedTuple

from nestax.models.config import DTYPES, ModelConfig
from nestax.models.llama_files import gguf, layout, llama2c, safetensors


class Pretrained(NamedTuple):
  """A model that somebody has trained.

  Attributes:
    config: family 'transformer', computing in float32; for bfloat16 use
      `dataclasses.replace(config, dtype='bfloat16')`.
    params: nested dict of numpy arrays, as `LanguageModel` takes them.
  """

  config: ModelConfig
  params: dict


def load(path: str | os.PathLike, dtype: str = 'float32') -> Pretrained:
  """Loads a Llama-type model into our Transformer++.

  Args:
    path: a .gguf file; a llama2.c .bin file; or a folder with config.json and
      model.safetensors (or model.safetensors.index.json and what it names),
      or one of those two files.
    dtype: of the parameters, 'float32' or 'bfloat16'.

  Raises:
    FileNotFoundError: if a file is missing.
    ImportError: if the package that reads it is: the extra `pretrained`.
    ValueError: in words, for another kind of file, one cut short or damaged,
      and for whatever our Transformer++ would compute otherwise than the
      model's makers do (other architectures, biases, experts, scaled rotary
      angles).
  """
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r}: one of {tuple(DTYPES)}')
  weights = _open(os.path.expanduser(os.fspath(path)))
  return Pretrained(weights.config, layout.params(weights, dtype))


def config(path: str | os.PathLike) -> ModelConfig:
  """Reads a file's header alone; takes and raises what `load` does."""
  return _open(os.path.expanduser(os.fspath(path))).config


def _open(path: str) -> layout.Weights:
  if not os.path.exists(path):
    raise FileNotFoundError(f'{path}: there is no such file or folder')
  if os.path.isdir(path):
    return safetensors.open_folder(path)
  name = os.path.basename(path)
  if name in ('model.safetensors', 'model.safetensors.index.json'):
    return safetensors.open_folder(os.path.dirname(path) or '.')
  if name.endswith('.gguf'):
    return gguf.open_file(path)
  if name.endswith('.bin') and not name.startswith('pytorch_model'):
    return llama2c.open_file(path)
  raise ValueError(
    f'{path}: weights come from a .gguf file, a llama2.c .bin file, or a '
    'folder with config.json and model.safetensors'
  )
