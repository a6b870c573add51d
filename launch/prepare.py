"""From a config to a plan: all that can be wrong is said before a run.

`compose` builds what a step needs, for devices that may be elsewhere;
`prepare` also checks the data and the folder of a run here.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import optax
from jax.sharding import Mesh

from nestax.launch import checkpoint, groups, initial, optimizer
from nestax.launch import mesh as meshes
from nestax.launch import step as steps
from nestax.launch.configs import common
from nestax.launch.data import pipeline
from nestax.models import language_model, model_state
from nestax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checked config and what it builds; no array is made yet.

  Attributes:
    memory: rows -> state of that many fresh sequences; None where no memory
      is carried from batch to batch.
    workdir: of the run; None for a plan that only `compose` has made.
  """

  config: Any
  model: language_model.LanguageModel
  mesh: Mesh
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  memory: Callable[[int], Any] | None
  params: dict | None
  frozen: Any
  workdir: pathlib.Path | None = None

  @property
  def carried(self) -> Callable[[], Any] | None:
    """Makes the fresh state of all rows of a batch; None as `memory` is."""
    if self.memory is None:
      return None
    return functools.partial(self.memory, self.config.train.batch)

  def program(self):
    """(shapes and shardings of the train state, the jitted step)."""
    abstract = steps.abstract_state(
      self.model, self.tx, self.mesh, self.carried
    )
    step = steps.train_step(
      self.model,
      self.tx,
      self.schedule,
      steps.shardings(abstract),
      self.config.train.accumulate,
      None if self.memory is None else steps.batch_axes(self.memory),
      self.frozen,
      self.config.train.loss_piece,
    )
    return abstract, step


def compose(config, devices=None) -> Plan:
  """Checks what model, optimiser and mesh can get wrong, and builds them.

  Args:
    config: ConfigDict with the groups of `configs.common.defaults`.
    devices: to lay them on; this machine's if not given.

  Raises:
    ValueError, OSError: in words, with the offending value.
  """
  common.check(config)
  config, given = initial.resolve(config)
  cfg = ModelConfig.from_dict(config.model)
  rows, length = config.train.batch, config.data.length
  parts = config.train.accumulate
  mesh = meshes.make(config.mesh, rows // parts, length, devices)
  model = language_model.LanguageModel(cfg)
  boxed = language_model.abstract(model)
  meshes.check_params(mesh, boxed)
  params = nn.unbox(boxed)
  tx, schedule = optimizer.build(config, params, mesh)
  _check_levels(cfg, length, config.train.carry_state)
  memory = None
  if config.train.carry_state:
    memory = functools.partial(model_state.init_state, cfg, length=length)
  frozen = groups.frozen(config, params)
  return Plan(config, model, mesh, tx, schedule, memory, given, frozen)


def prepare(config, workdir) -> Plan:
  """Checks everything that can be wrong with a config before it is used.

  Args:
    config: as `compose` takes it.
    workdir: where the run lies; made if it is not there.

  Raises:
    ValueError, OSError: in words, with the offending value.
  """
  plan = compose(config)
  pipeline.check(plan.config, plan.model.cfg.V)
  checkpoint.check_writable(workdir)
  return dataclasses.replace(plan, workdir=pathlib.Path(workdir))


def _check_levels(cfg: ModelConfig, length: int, carried: bool) -> None:
  """Refuses levels that would never use what they learn."""
  if cfg.stream and not carried and length <= cfg.stream.periods[0]:
    raise ValueError(
      f'data.length = {length} tokens: the fastest level commits every '
      f'{cfg.stream.periods[0]}, so no level of a row would learn; give longer '
      'rows, shorter model.cms.periods or train.carry_state=True'
    )
