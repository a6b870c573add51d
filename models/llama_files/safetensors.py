"""Hugging Face folders: config.json beside one or more .safetensors files."""

import json
import os
import re

import numpy as np

from nestax.models.config import ModelConfig
from nestax.models.llama_files.layout import Weights

_NAMES = {
  'embed': 'model.embed_tokens.weight',
  'final_norm': 'model.norm.weight',
  'head': 'lm_head.weight',
  'mixer_norm': 'model.layers.{}.input_layernorm.weight',
  'query': 'model.layers.{}.self_attn.q_proj.weight',
  'key': 'model.layers.{}.self_attn.k_proj.weight',
  'value': 'model.layers.{}.self_attn.v_proj.weight',
  'out': 'model.layers.{}.self_attn.o_proj.weight',
  'mlp_norm': 'model.layers.{}.post_attention_layernorm.weight',
  'gate': 'model.layers.{}.mlp.gate_proj.weight',
  'up': 'model.layers.{}.mlp.up_proj.weight',
  'down': 'model.layers.{}.mlp.down_proj.weight',
}
_ANGLES = re.compile(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq')
_DTYPES = ('F64', 'F32', 'F16', 'BF16')
_MODELS = ('llama', 'mistral')
# Keys that may only have these values (or be absent); others change the model.
_ONLY = {
  'hidden_act': ('silu', 'swish'),
  'attention_bias': (False, None),
  'mlp_bias': (False, None),
  'partial_rotary_factor': (1, 1.0, None),
  'rope_interleaved': (False, None),
  'quantization_config': (None,),
  'num_local_experts': (0, 1, None),
}


def open_folder(folder: str) -> Weights:
  """Opens `folder`: config.json and model.safetensors or its index.

  Raises:
    FileNotFoundError: naming the file that is missing.
    ImportError: if the safetensors package is missing.
    ValueError: in words, for what our Transformer++ cannot be: another
      architecture, biases, scaled rotary angles, quantised weights.
  """
  about = _json(os.path.join(folder, 'config.json'))
  config = _config(os.path.join(folder, 'config.json'), about)
  places = {}
  for path in _files(folder):
    handle = _open(path)
    for name in handle.keys():
      if name in places:
        raise ValueError(f'{folder}: {name} is in two of its files')
      places[name] = (path, handle)
  _check_index(folder, places)

  def read(name):
    path, handle = places[name]
    kind = handle.get_slice(name).get_dtype()
    if kind not in _DTYPES:
      raise ValueError(
        f'{path}: {name} is {kind}; one of {", ".join(_DTYPES)} is wanted'
      )
    return handle.get_tensor(name)

  shapes = {
    name: tuple(handle.get_slice(name).get_shape())
    for name, (_, handle) in places.items()
  }
  for name in [name for name in shapes if _ANGLES.fullmatch(name)]:
    _check_angles(places[name][0], name, read(name), config)
    del shapes[name]
  if config.tied and _NAMES['head'] in shapes:
    # a head saved beside the embedding that it is said to be
    if not np.array_equal(read(_NAMES['head']), read(_NAMES['embed'])):
      raise ValueError(
        f'{folder}: config.json says tie_word_embeddings, but '
        f'{_NAMES["head"]} differs from {_NAMES["embed"]}'
      )
    del shapes[_NAMES['head']]
  return Weights(folder, config, _NAMES, shapes, read, False)


def specials(folder: str) -> dict[str, int]:
  """Ids of bos and eos as config.json has them; of several eos the first.

  Raises:
    FileNotFoundError: if there is no config.json.
    ValueError: if it is no JSON object, or an id is no number.
  """
  path = os.path.join(folder, 'config.json')
  about, found = _json(path), {}
  for name in ('bos', 'eos'):
    token = about.get(f'{name}_token_id')
    if isinstance(token, list) and token:
      token = token[0]
    if token is None:
      continue
    if type(token) is not int or token < 0:
      raise ValueError(f'{path}: {name}_token_id={token!r}; an id is wanted')
    found[name] = token
  return found


def _json(path: str) -> dict:
  if not os.path.isfile(path):
    raise FileNotFoundError(f'{path}: there is no such file')
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from error
  if not isinstance(found, dict):
    raise ValueError(f'{path}: a JSON object is wanted')
  return found


def _files(folder: str) -> list[str]:
  whole = os.path.join(folder, 'model.safetensors')
  index = whole + '.index.json'
  if not os.path.isfile(index):
    if not os.path.isfile(whole):
      raise FileNotFoundError(
        f'{folder} holds neither model.safetensors nor '
        'model.safetensors.index.json'
      )
    return [whole]
  names = sorted(set(_index(index).values()))
  for name in names:
    path = os.path.join(folder, name)
    if os.path.basename(name) != name or not os.path.isfile(path):
      raise FileNotFoundError(f'{index} names {name}, which is not beside it')
  return [os.path.join(folder, name) for name in names]


def _index(path: str) -> dict[str, str]:
  """Tensor to file, of an index."""
  table = _json(path).get('weight_map')
  if not isinstance(table, dict) or not all(
    isinstance(name, str) for name in table.values()
  ):
    raise ValueError(f'{path}: weight_map must map tensors to files')
  return table


def _check_index(folder: str, places) -> None:
  path = os.path.join(folder, 'model.safetensors.index.json')
  if os.path.isfile(path):
    for name, file in _index(path).items():
      found = os.path.basename(places[name][0]) if name in places else None
      if found != file:
        raise ValueError(
          f'{path} says that {name} is in {file}, but it is '
          f'{"in " + found if found else "in none of the files"}'
        )


def _open(path: str):
  try:
    import safetensors
  except ImportError as error:
    raise ImportError(
      f"{path} needs the safetensors package: pip install 'nestax[pretrained]'"
    ) from error
  try:
    return safetensors.safe_open(path, framework='numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} is no safetensors file, or cut short: {error}'
    ) from error


def _config(path: str, about: dict) -> ModelConfig:
  kind = about.get('model_type')
  if kind not in _MODELS:
    raise ValueError(
      f'{path}: model_type {kind!r} ({about.get("architectures")}); only '
      f'{" and ".join(_MODELS)} are supported'
    )
  for key, only in _ONLY.items():
    if about.get(key, only[0]) not in only:
      raise ValueError(f'{path}: {key}={about[key]!r} is not supported')

  def take(key, default=None):
    found = about.get(key)
    found = default if found is None else found
    if found is None:
      raise ValueError(f'{path} lacks {key}')
    return found

  H = take('num_attention_heads')
  # of an old Mistral's config that does not mention a window it has 4096
  default = 4096 if kind == 'mistral' else None
  values = {
    'family': 'transformer',
    'V': take('vocab_size'),
    'D': take('hidden_size'),
    'N': take('num_hidden_layers'),
    'H': H,
    'K': take('head_dim', 0),
    'G': take('num_key_value_heads', 8 if kind == 'mistral' else H),
    'F': take('intermediate_size'),
    'window': about.get('sliding_window', default) or 0,
    'rope_base': _rope_base(path, about),
    'epsilon': take('rms_norm_eps', 1e-6),
    'tied': take('tie_word_embeddings', False),
    'dtype': 'float32',
  }
  _check_layers(path, about, values['window'])
  try:
    return ModelConfig.from_dict(values)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None


def _rope_base(path: str, about: dict):
  """The base of the angles, from where older and newer files have it."""
  rope = about.get('rope_parameters') or {}
  for given in (rope, about.get('rope_scaling') or {}):
    kind = given.get('rope_type', given.get('type', 'default'))
    if kind != 'default' or given.get('factor', 1) != 1:
      raise ValueError(f'{path}: scaled rotary angles, {given}, not supported')
    if given.get('partial_rotary_factor', 1) != 1:
      raise ValueError(f'{path}: partly rotated heads, {given}, not supported')
  base = rope.get('rope_theta', about.get('rope_theta'))
  return 10_000.0 if base is None else base


def _check_layers(path: str, about: dict, window) -> None:
  want = 'sliding_attention' if window else 'full_attention'
  kinds = set(about.get('layer_types') or [want])
  if kinds != {want}:
    raise ValueError(
      f'{path}: layer_types {sorted(kinds)} with a sliding window of {window} '
      f'are not supported; all must be {want}'
    )


def _check_angles(path: str, name: str, rates, cfg: ModelConfig) -> None:
  half = cfg.head_width // 2
  want = cfg.rope_base ** (-np.arange(half) / half)
  rates = np.asarray(rates, np.float32)
  if rates.shape != want.shape or not np.allclose(rates, want, rtol=1e-2):
    raise ValueError(
      f'{path}: {name} is not what the base {cfg.rope_base:g} gives'
    )
