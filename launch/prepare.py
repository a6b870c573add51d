"""From a config to a plan: all that can be wrong is said before a run."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from nestax.launch import checkpoint, groups, initial, optimizer
from nestax.launch import mesh as meshes
from nestax.launch import step as steps
from nestax.launch.configs import common
from nestax.launch.data import pipeline
from nestax.models import language_model
from nestax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checked config and what it builds; no array is made yet.

  Attributes:
    memory: rows -> state of that many fresh sequences; None where no memory
      is carried from batch to batch.
  """

  config: Any
  workdir: pathlib.Path
  model: language_model.LanguageModel
  mesh: Mesh
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  memory: Callable[[int], Any] | None
  params: dict | None
  frozen: Any


def prepare(config, workdir) -> Plan:
  """Checks everything that can be wrong with a config before it is used.

  Args:
    config: ConfigDict with the groups of `configs.common.defaults`.
    workdir: where the run lies; made if it is not there.

  Raises:
    ValueError, OSError: in words, with the offending value.
  """
  common.check(config)
  config, given = initial.resolve(config)
  cfg = ModelConfig.from_dict(config.model)
  rows, length = config.train.batch, config.data.length
  mesh = meshes.make(config.mesh, rows // config.train.accumulate, length)
  model = language_model.LanguageModel(cfg)
  boxed = steps.abstract_params(model)
  meshes.check_params(mesh, boxed)
  params = nn.unbox(boxed)
  tx, schedule = optimizer.build(config, params, mesh)
  _check_levels(cfg, length, config.train.carry_state)
  pipeline.check(config, cfg.V, jax.process_count())
  checkpoint.check_writable(workdir)
  memory = None
  if config.train.carry_state:
    memory = functools.partial(language_model.init_state, cfg, length=length)
  workdir = pathlib.Path(workdir)
  frozen = groups.frozen(config, params)
  return Plan(config, workdir, model, mesh, tx, schedule, memory, given, frozen)


def _check_levels(cfg: ModelConfig, length: int, carried: bool) -> None:
  """Refuses levels that would never use what they learn."""
  if cfg.stream and not carried and length <= cfg.stream.periods[0]:
    raise ValueError(
      f'data.length = {length} tokens: the fastest level commits every '
      f'{cfg.stream.periods[0]}, so no level of a row would learn; give longer '
      'rows, shorter model.cms.periods or train.carry_state=True'
    )
