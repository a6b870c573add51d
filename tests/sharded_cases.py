"""Tiny models of every family, trained a few steps on a mesh."""

import functools

import jax
import numpy as np

from nestax.launch import mesh as meshes
from nestax.launch import optimizer
from nestax.launch import step as steps
from nestax.launch.configs import common
from nestax.models import axes, language_model, model_state
from nestax.models.config import ModelConfig
from nestax.models.families import WINDOWED

B, L, V, STEPS = 8, 8, 32, 3
ONE = {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}
GROUPED = ('hope_attention', 'transformer')


def config(family: str, levels: bool = False, **options) -> ModelConfig:
  """One block of width 16 with a level, which learns if `levels`."""
  values = {'V': V, 'D': 16, 'N': 1, 'H': 4, 'F': 32, 'dtype': 'float32'}
  values |= {'memory': {'chunk_mem': 4, 'chunk_rest': 4}}
  values |= {'G': 2} if family in GROUPED else {}
  values |= {'window': 4} if family in WINDOWED else {}
  cms = {'periods': (4,)}
  if levels:
    cms |= {'blocks': 'all', 'rate': 0.3, 'optimizer': 'momentum'}
  return ModelConfig.from_dict(
    {'family': family} | values | {'cms': cms} | options
  )


def batch(seed: int):
  """Rows of two documents each, some targets not scored."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, V, (B, L + 1)).astype(np.int32)
  reset = np.zeros((B, L), bool)
  reset[:, 0] = seed == 0
  reset[np.arange(B), rng.integers(1, L, B)] = True
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': (rng.random((B, L)) < 0.8).astype(np.float32),
    'bytes': np.ones((B, L), np.int32),
    'reset': reset,
  }


def parts_of_a_run(cfg: ModelConfig, name: str, sizes, parts: int = 1):
  """(mesh, model, optimiser, its schedule) as `launch.prepare` makes them."""
  settings = common.defaults()
  settings.optimizer = name
  settings.opt.update({'warmup': 0, 'lr': 1e-3, 'every': 2, 'ns_steps': 2})
  mesh = meshes.make(ONE | sizes, B // parts, L)
  model = language_model.LanguageModel(cfg)
  tx, schedule = optimizer.build(settings, language_model.abstract(model), mesh)
  return mesh, model, tx, schedule


def train(cfg: ModelConfig, name: str, sizes, parts: int = 1, carry=False):
  """Trains STEPS steps.

  Returns:
    On the host: the losses, the first parameters, the last ones and, if
    `carry`, the state of the sequences that the batches continued.
  """
  mesh, model, tx, schedule = parts_of_a_run(cfg, name, sizes, parts)
  memory, rows_axes = None, None
  if carry:
    fresh = functools.partial(model_state.init_state, cfg, length=L)
    memory, rows_axes = lambda: fresh(B), steps.batch_axes(fresh)
  with jax.set_mesh(mesh):
    state = steps.init_state(model, tx, mesh, 0, memory)
    layout, rows = steps.shardings(state), axes.batch_sharding(mesh)
    run = steps.train_step(model, tx, schedule, layout, parts, rows_axes)
    first, losses = jax.device_get(state.params), []
    for seed in range(STEPS):
      state, metrics = run(state, jax.device_put(batch(seed), rows))
      losses.append(float(metrics['loss']))
  assert steps.shardings(state) == layout
  return np.array(losses), first, *jax.device_get((state.params, state.memory))
