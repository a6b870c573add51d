"""Compiles whole steps ahead of time, for devices that are elsewhere.

What is compiled is what would run: the step of nestax-train with its state in
shards and donated, microbatches and optimiser included, or one decoded token
of a batch of streams. For a TPU's topology libtpu compiles on any machine;
`cpu:8` takes this machine's own devices.
"""

import math
import os
import re
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from nestax.launch import prepare
from nestax.launch.benches import tpu
from nestax.models import axes, language_model, model_state
from nestax.models.config import ModelConfig
from nestax.models.memory import pallas_tpu

# The compiler's numbers for its levels; only newer JAX has names for them.
EFFORTS = {'O0': 9, 'O1': 19, 'O2': 29, 'O3': 39}


class AheadError(ValueError):
  """What is asked for cannot be compiled, in words."""


class Compiled(NamedTuple):
  """A program, or why the compiler refused it.

  Attributes:
    plan: what was compiled.
    state: shapes and shardings of what stays on the devices.
    program: None if it takes more memory than there is.
    refused: the compiler's words then.
    memory: how a memory's recurrence runs: scan, pallas, token or none.
    seconds: that compiling took.
  """

  plan: prepare.Plan
  state: Any
  program: Any
  refused: str
  memory: str
  seconds: float


def settle(topology: str) -> None:
  """Sets up this process for a topology, before JAX looks for devices.

  Raises:
    AheadError: for a topology that is none, or without libtpu.
  """
  kind, _, size = topology.partition(':')
  if kind == 'cpu':
    if not size.isdecimal() or not int(size):
      raise AheadError(f'topology {topology}: write it as cpu:8')
    if jax.config.jax_num_cpu_devices < int(size):
      jax.config.update('jax_num_cpu_devices', int(size))
    jax.config.update('jax_platforms', 'cpu')
    return
  try:
    os.environ.update(tpu.settings(topology))
  except tpu.TpuError as error:
    raise AheadError(f'{error}; or this machine as cpu:8') from None
  if not tpu.available():
    raise AheadError(tpu.MISSING)
  # TPUs that this machine may have are left alone
  jax.config.update('jax_platforms', 'cpu')


def devices(topology: str) -> list:
  """The devices of a topology, after `settle`.

  Raises:
    AheadError: with the compiler's words, if there is no such topology.
  """
  kind, _, size = topology.partition(':')
  if kind == 'cpu':
    here = jax.devices('cpu')
    if len(here) < int(size):
      raise AheadError(f'{topology}: this process has {len(here)} CPU devices')
    return here[: int(size)]
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=topology)
  except Exception as error:  # of several types, by what libtpu dislikes
    words = str(error).strip().splitlines() or [type(error).__name__]
    raise AheadError(f'topology {topology}: {words[0]}') from error
  return list(found.devices)


def compile_step(
  config,
  where: list,
  serve: bool = False,
  say=lambda words: None,
  effort: str = '',
) -> Compiled:
  """Compiles a step of a config.

  On TPUs the memory's kernels are taken where they cover the rule and the
  mesh, else the scan; `memory.implementation` names one.

  Args:
    config: ConfigDict of a run; left as it is.
    where: the devices.
    serve: one decoded token of `train.batch` streams that have room for
      `data.length` tokens, in place of a training step.
    say: told what is compiled, before the minutes that it takes.
    effort: of the compiler, see `options`.

  Raises:
    ValueError: in words, for a config, a mesh or an effort that does not fit.
    AheadError: for a program that the compiler cannot make.
  """
  lower, chosen = _decode if serve else _train, options(effort)
  for memory in _implementations(config, where[0].platform, serve):
    trial = config.copy_and_resolve_references()
    trial.model.memory.implementation = memory
    plan = prepare.compose(trial, where)
    try:
      with jax.set_mesh(plan.mesh):
        state, lowered = lower(plan)
      break
    except NotImplementedError as error:
      words = str(error)  # kernels that cannot be laid on a mesh
  else:
    raise AheadError(f'{memory}: {words}')
  name = memory or ('token' if serve else 'scan')
  if plan.model.cfg.rule is None:
    name = 'none'
  say(f'{config.name} for {plan.mesh.size} devices, the memory by {name}')
  start = time.perf_counter()
  program, refused = _compile(lowered, chosen)
  seconds = time.perf_counter() - start
  return Compiled(plan, state, program, refused, name, seconds)


def options(effort: str) -> dict[str, int]:
  """What the compiler is told of how hard to try.

  Args:
    effort: O0, soonest done, to O3 (openxla.org/xla/effort_levels). Where it is
      '' the compiler is told nothing, as in a run. O0 and O1 look less for a
      schedule that overlaps and for ways to save memory: FLOPs stay, memory and
      traffic may turn out higher than a run's.

  Raises:
    AheadError: for another word.
  """
  if not effort:
    return {}
  if effort not in EFFORTS:
    raise AheadError(
      f'effort {effort}: one of {", ".join(EFFORTS)}, or none as in a run'
    )
  names = ('optimization_level', 'memory_fitting_level')
  return dict.fromkeys(names, EFFORTS[effort])


def _implementations(config, platform: str, serve: bool) -> list[str]:
  """What to try, in turn; '' lets the model pick as on a CPU."""
  asked = config.model.memory.implementation
  cfg = ModelConfig.from_dict(config.model)
  rule = cfg.rule
  # what MAC reads depends on what it has read: it walks piece by piece
  if asked or rule is None or cfg.family == 'titans_mac':
    return [asked]
  twice = cfg.adapting and cfg.cms.differentiate == 'full'
  if platform != 'tpu' or twice or serve:
    return ['']
  try:
    size = config.data.length, cfg.head_width, cfg.compute_dtype
    pallas_tpu.check_rows(rule, *size)
  except pallas_tpu.DoesNotFit:
    return ['']
  return ['pallas', '']


def abstract_batch(plan: prepare.Plan) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch as the pipeline gives it, laid on the plan's mesh."""
  shape = plan.config.train.batch, plan.config.data.length
  sharding = axes.batch_sharding(plan.mesh)
  kinds = {
    'tokens': jnp.int32,
    'targets': jnp.int32,
    'weights': jnp.float32,
    'bytes': jnp.int32,
    'reset': jnp.bool_,
  }
  return {
    name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding)
    for name, kind in kinds.items()
  }


def _train(plan: prepare.Plan):
  state, step = plan.program()
  return state, step.lower(state, abstract_batch(plan))


class Serving(NamedTuple):
  """What stays on the devices while tokens are decoded."""

  params: Any
  opt_state: None
  memory: Any


def _decode(plan: prepare.Plan):
  rows, length = plan.config.train.batch, plan.config.data.length
  model, mesh = plan.model, plan.mesh
  boxed = language_model.abstract(model)

  def lay(tree, layout):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      layout,
    )

  params = lay(nn.unbox(boxed), axes.shardings(mesh, boxed))
  memory = jax.eval_shape(
    lambda: model_state.init_state(model.cfg, rows, length)
  )
  layout = model_state.state_shardings(mesh, memory)
  memory = lay(memory, layout)
  tokens_B = jax.ShapeDtypeStruct(
    (rows,), jnp.int32, sharding=axes.batch_sharding(mesh, 1)
  )

  def step(params, state, tokens_B):
    state, logits = model.apply({'params': params}, state, tokens_B[:, None])
    return state, jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

  run = jax.jit(
    step, donate_argnums=1, out_shardings=(layout, tokens_B.sharding)
  )
  return Serving(params, None, memory), run.lower(params, memory, tokens_B)


def _compile(lowered, options):
  """(program, '') or (None, why there is not enough memory)."""
  try:
    return lowered.compile(compiler_options=options or None), ''
  except jax.errors.JaxRuntimeError as error:
    words = str(error)
    found = re.search(r'[Rr]an out of memory[^\n]*?(Used [^\n]*?)\. ', words)
    if 'RESOURCE_EXHAUSTED' in words or found:
      return None, found[1] if found else words.strip().splitlines()[0]
    raise AheadError(f'the compiler: {words.splitlines()[0]}') from error


def bytes_of(tree) -> int:
  """Bytes of one device's shards of a tree of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
