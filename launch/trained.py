"""A trained model out of its run folder."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax

from nestax.launch import checkpoint
from nestax.launch import mesh as meshes
from nestax.launch.data import tokenizers
from nestax.models import axes, language_model
from nestax.models.config import ModelConfig


class Trained(NamedTuple):
  """What a run has made."""

  model: language_model.LanguageModel
  params: dict
  tokenizer: tokenizers.Tokenizer
  step: int


def _to_stderr(line: str) -> None:
  print(line, file=sys.stderr)


def load(workdir, say: Callable[[str], None] = _to_stderr) -> Trained:
  """Loads the newest readable checkpoint of a run onto one device.

  Args:
    workdir: folder of the run.
    say: what to tell the user, a line at a time.

  Raises:
    FileNotFoundError: if there is no checkpoint.
    checkpoint.CheckpointError: if none can be read.
    ValueError: if the tokenizer of the run is not there any more.
  """
  mesh = meshes.make(dict.fromkeys(axes.MESH_AXES, 1), rows=1, length=1)
  whole = meshes.replicated(mesh)

  def abstract(config):
    cfg = ModelConfig.from_dict(config['model'])
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
      nn.unbox(language_model.abstract_params(cfg)),
    )

  step, config, params = checkpoint.load_params(workdir, abstract, say)
  model = language_model.LanguageModel(ModelConfig.from_dict(config['model']))
  tokenizer = tokenizers.load(config['data']['tokenizer'])
  return Trained(model, params, tokenizer, step)
