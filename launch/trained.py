"""A trained model: out of its run folder, or a pretrained one of a file."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax

from nestax.launch import checkpoint
from nestax.launch import mesh as meshes
from nestax.launch.data import llama_tokenizers, tokenizers
from nestax.models import axes, language_model, model_state, pretrained
from nestax.models.config import ModelConfig
from nestax.models.llama_files import safetensors
from nestax.sleep import owners


class Trained(NamedTuple):
  """What a run has made, or somebody else's."""

  model: language_model.LanguageModel
  params: dict
  tokenizer: tokenizers.Tokenizer
  step: int
  words: str = ''  # what `tokenizers.load` takes for the tokenizer


def _to_stderr(line: str) -> None:
  print(line, file=sys.stderr)


def load(
  workdir, say: Callable[[str], None] = _to_stderr, owner: str = ''
) -> Trained:
  """Loads the newest readable checkpoint of a run onto one device.

  Args:
    workdir: folder of the run.
    say: what to tell the user, a line at a time.
    owner: whose model to load, of a life whose owners have slots of their own:
      the common weights with that owner's slots. What the levels hold that the
      owner has not slept on is left out. '' for the common weights alone.

  Raises:
    FileNotFoundError: if there is no checkpoint.
    checkpoint.CheckpointError: if none can be read.
    ValueError: if the tokenizer of the run is not there any more, or there is
      no such owner.
  """
  mesh = meshes.make(dict.fromkeys(axes.MESH_AXES, 1), rows=1, length=1)
  whole = meshes.replicated(mesh)

  def abstract(config, position):
    cfg = ModelConfig.from_dict(config['model'])
    parts = {'params': nn.unbox(language_model.abstract_params(cfg))}
    if owner and _apart(config):
      size = len(position()['owners']), config['life']['window']
      init = functools.partial(model_state.init_state, cfg, *size)
      parts['state'] = jax.eval_shape(init)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), parts
    )

  found = checkpoint.load_parts(workdir, abstract, say)
  cfg = ModelConfig.from_dict(found.config['model'])
  params, words = found.parts['params'], found.config['data']['tokenizer']
  if owner:
    row = _row(workdir, found.config, found.position, owner)
    params = owners.personal(params, found.parts['state'], row)
    # a fresh state would bring empty slots that hide these
    cfg = dataclasses.replace(
      cfg, cms=dataclasses.replace(cfg.cms, scope='shared')
    )
  model = language_model.LanguageModel(cfg)
  return Trained(model, params, _of_run(words), found.step, words)


def tokenizer_of_run(workdir) -> tokenizers.Tokenizer:
  """The tokenizer that `load` gives, without the model; raises as it does."""
  found = checkpoint.load_parts(workdir, lambda *_: {}, lambda line: None)
  return _of_run(found.config['data']['tokenizer'])


def _of_run(words: str) -> tokenizers.Tokenizer:
  # whatever the tokenizer's own model wants: here all documents began so
  return dataclasses.replace(tokenizers.load(words), adds_bos=True)


def _apart(config) -> bool:
  """Whether it is a life whose owners have slots of their own."""
  return 'life' in config and config['model']['cms']['scope'] == 'owner'


def _row(workdir, config, position: Callable[[], dict], owner: str) -> int:
  """The owner's row of the state."""
  if not _apart(config):
    raise ValueError(
      f'--owner={owner}: nobody has slots of their own in {workdir}; owners of '
      'a life of nestax-sleep --scope=owner do'
    )
  past = position()
  present = [x for x in past['owners'] if x not in past['forgotten']]
  if owner not in present:
    raise ValueError(
      f'--owner={owner}: there is no such owner in {workdir}; there are '
      f'{", ".join(present)}'
    )
  return past['owners'].index(owner)


def load_pretrained(path, tokenizer: str | None = None) -> Trained:
  """Loads a Llama-type model from a file; `step` is 0.

  Args:
    path: of the weights, as `pretrained.load` takes it.
    tokenizer: path of one, as `tokenizers.load` takes it; None takes that of
      the GGUF file, or the file beside the weights: tokenizer.json or
      tokenizer.model, for llama2.c tok<vocabulary>.bin or tokenizer.bin.

  Raises:
    FileNotFoundError: if weights or tokenizer are not there.
    ImportError: if the extra `pretrained` is not installed.
    ValueError: in words, if one of them can't be used or they do not fit.
  """
  path = os.path.expanduser(os.fspath(path))
  config, params = pretrained.load(path)
  words = tokenizer or tokenizer_of(path, config.V)
  found = _of_pretrained(path, config.V, words)
  params = jax.tree.map(jax.numpy.asarray, params)
  model = language_model.LanguageModel(config)
  return Trained(model, params, found, 0, words)


def tokenizer_of_pretrained(path) -> tokenizers.Tokenizer:
  """What `load_pretrained` gives, without the weights; raises as it does."""
  path = os.path.expanduser(os.fspath(path))
  V = pretrained.config(path).V
  return _of_pretrained(path, V, tokenizer_of(path, V))


def _of_pretrained(path: str, V: int, words: str) -> tokenizers.Tokenizer:
  found = tokenizers.load(words)
  if not path.endswith(('.gguf', '.bin')):
    found = _with_specials(found, _folder(path), V)
  if found.vocab_size > V:
    raise ValueError(
      f'the tokenizer of {path} has {found.vocab_size} ids, the end of text '
      f'included; the model knows {V}'
    )
  return found


def choose(workdir: str | None, model: str | None, owner: str = '') -> Trained:
  """Loads a run (runs/quickstart if neither is given) or a pretrained model.

  Raises:
    ValueError: if both are given, or an owner of a pretrained model, else as
      `load` and `load_pretrained`.
  """
  if workdir and model:
    raise ValueError('give --workdir or --model, not both')
  if model:
    refuse_owner(owner)
    return load_pretrained(model)
  return load(workdir or 'runs/quickstart', owner=owner)


def refuse_owner(owner: str) -> None:
  """Raises a ValueError for an owner of a pretrained model."""
  if owner:
    raise ValueError(
      f'--owner={owner} goes with the --workdir of a life; nobody has slots of '
      'their own in a --model'
    )


def tokenizer_of(path: str, vocabulary: int) -> str:
  """Finds the tokenizer of a pretrained file, as `load_pretrained` does.

  Raises:
    FileNotFoundError: if there is none.
  """
  if path.endswith('.gguf'):
    return path
  if path.endswith('.bin'):
    return llama_tokenizers.beside_llama2c(path, vocabulary)
  folder = _folder(path)
  for name in ('tokenizer.json', 'tokenizer.model'):
    if os.path.isfile(os.path.join(folder, name)):
      return os.path.join(folder, name)
  raise FileNotFoundError(
    f'{folder} holds no tokenizer: neither tokenizer.json nor tokenizer.model'
  )


def _folder(path: str) -> str:
  return path if os.path.isdir(path) else os.path.dirname(path) or '.'


def _with_specials(found, folder: str, vocabulary: int):
  """The tokenizer with bos and eos of config.json, which knows better."""
  ids = safetensors.specials(folder)
  for name, token in ids.items():
    if token >= vocabulary:
      raise ValueError(
        f'{folder}: config.json says {name}_token_id={token}; the model knows '
        f'{vocabulary} ids'
      )
  pieces = list(found.pieces)
  if 'eos' in ids and found.eos == vocabulary == len(pieces) - 1:
    del pieces[-1]  # the eos that a file without one is given
  pieces += [b''] * (max(ids.values(), default=-1) + 1 - len(pieces))
  for token in ids.values():
    pieces[token] = b''
  made = dataclasses.replace(found, pieces=tuple(pieces), **ids)
  lost = {
    k: made.eos for k in ('bos', 'pad') if getattr(made, k) >= len(pieces)
  }
  return dataclasses.replace(made, **lost)
