"""A run, from a config to a trained model: opens it, trains, sums it up."""

import contextlib
import functools
import json
import time
from collections.abc import Callable

import jax

from nestax.launch import (
  checkpoint,
  distributed,
  ending,
  goodput,
  lock,
  metrics,
  profile,
  progress,
  room,
  validation,
)
from nestax.launch import loop as loops
from nestax.launch import mesh as meshes
from nestax.launch import step as steps
from nestax.launch.data import corpora, pipeline
from nestax.launch.loop import BadSteps as BadSteps
from nestax.launch.prepare import Plan
from nestax.launch.prepare import prepare as prepare
from nestax.launch.room import OutOfMemory as OutOfMemory
from nestax.launch.signals import Agreement, Signals
from nestax.launch.signals import Interrupted as Interrupted
from nestax.models import families, language_model
from nestax.models.config import ModelConfig
from nestax.models.memory import gpu_pieces

STRIDE = 4  # chunks, as advised where memory is short

# What ends a run that was well begun, each in words.
FAILURES = (
  BadSteps,
  OutOfMemory,
  checkpoint.CheckpointError,
  corpora.DataError,
  distributed.Elsewhere,
  distributed.Lost,
)


def train(plan: Plan) -> dict[str, float]:
  """Trains to `config.train.steps`, from the newest checkpoint if there is one.

  Leaves in the workdir: `checkpoints`, `metrics.jsonl`, `tensorboard`,
  `loss.png`, `sample.txt`.

  Returns:
    The last validation's `loss` (nats a token) and `bits_per_byte`, and
    `bigram`, the bits per byte of the same bytes under their own bigrams.

  Raises:
    Interrupted: after saving, when SIGTERM or SIGINT came.
    BadSteps: after `train.max_bad_steps` of them in a row.
    OutOfMemory: if a device has no room for the state or a step.
    checkpoint.CheckpointError: if checkpoints cannot be written or read.
    lock.InUse: if another run is going on in the workdir.
    distributed.Elsewhere: if another process could not begin.
    distributed.Lost: if another process has gone; it is better then to end
      by `distributed.leave` than to wait for it.
  """
  with contextlib.ExitStack() as held:
    with distributed.together():
      take = jax.process_index() == 0
      held.enter_context(lock.held(plan.workdir, take=take))
    distributed.check_shared(plan.workdir)
    say = functools.partial(_advice, plan)
    with distributed.others_needed(), room.in_words(say, 'model.memory'):
      return _train(plan)


def _advice(plan: Plan, much: str) -> str:
  """What takes less than a step for which there was no room."""
  train, less = plan.config.train, ['shorter rows (data.length)']
  if plan.config.model.remat != 'full':
    less.append('model.remat=full')
  if _strides(plan):
    less.append(f'model.memory.stride={STRIDE}')
  if train.batch % (2 * train.accumulate) == 0:
    less.append(f'the batch in pieces, train.accumulate={2 * train.accumulate}')
  if train.batch > 1:
    less.append('fewer rows (train.batch)')
  return (
    f'the device has no room for a step of train.batch={train.batch} rows of '
    f'data.length={plan.config.data.length}{much}. Less is needed by '
    f'{" or ".join(reversed(less))}; nestax-compile says beforehand how much'
  )


def _strides(plan: Plan) -> bool:
  """Whether a memory would keep less with a stride."""
  cfg = ModelConfig.from_dict(plan.config.model)
  family = families.FAMILY[cfg.family]
  rule = families.rule(cfg.family, cfg.memory)
  reads = family.memory is None or 'stride' in family.memory
  if rule is None or not reads or rule.implementation == 'token':
    return False
  # a GPU's kernels keep every sixteenth chunk's at most
  many = plan.config.data.length > gpu_pieces.SHORT * rule.step
  return many and rule.stride == 1


def _train(plan: Plan) -> dict[str, float]:
  began, spent = time.perf_counter(), goodput.Goodput()
  part = meshes.part(plan.mesh, plan.config.train.batch)
  data = pipeline.train_iterator(plan.config, part.rows)
  valid = pipeline.valid_batches(plan.config, part.rows)
  bigram = pipeline.bigram_bits_per_byte(plan.config)
  with jax.set_mesh(plan.mesh), Signals() as signals:
    lay = functools.partial(meshes.put, plan.mesh, part=part)
    loop, state = _open(plan, lay, data, valid, signals, spent)
    try:
      state = loops.run(loop, state)
    except jax.errors.JaxRuntimeError:
      loop.checkpoints.abandon()
      raise
    finally:
      loop.close()
    told = distributed.told(json.dumps(loop.log.last('valid', loop.last)))
    if jax.process_index() == 0:
      ending.write_sample(plan, state.params)
  final = json.loads(told)
  _sum_up(loop, final, bigram, began)
  names = ('loss', 'bits_per_byte')
  return {name: final[name] for name in names} | {'bigram': bigram}


def _open(
  plan: Plan,
  lay: Callable[[dict], dict],
  data,
  valid,
  signals: Signals,
  spent: goodput.Goodput,
) -> tuple[loops.Loop, steps.TrainState]:
  """The newest readable state or a fresh one, and what its steps work with."""
  config, first = plan.config, jax.process_index() == 0
  abstract, train_step = plan.program()
  say = print if first else lambda line: None
  checkpoints = checkpoint.Checkpoints(plan.workdir, config, say)
  state = checkpoints.restore(abstract, data)
  if state is None:
    state = steps.init_state(
      plan.model, plan.tx, plan.mesh, config.seed, plan.carried, plan.params
    )
  done = int(state.step)
  last = max(config.train.steps, done)

  agreed = Agreement(plan.mesh)
  stopped = lambda: agreed(signals.received)  # noqa: E731
  evaluate = functools.partial(
    validation.evaluate,
    plan.model.cfg,
    steps.eval_step(plan.model, config.train.loss_piece),
    lambda: map(lay, valid),
    stopped,
    spent,
  )
  show = progress.show(done, last, config.log.every)
  loop = loops.Loop(
    plan=plan,
    done=done,
    last=last,
    step=train_step,
    data=data,
    lay=lay,
    evaluate=evaluate,
    stopped=stopped,
    checkpoints=checkpoints,
    log=metrics.Log(plan.workdir, done, write=first),
    speed=_speed(config, plan.model.cfg),
    show=show,
    traced=profile.Profile(config.profile, plan.workdir, done, show.say),
    spent=spent,
  )
  _introduce(loop, sum(x.size for x in jax.tree.leaves(abstract.params)))
  return loop, state


def _introduce(loop: loops.Loop, parameters: int) -> None:
  """Says what is trained, on what, and what could be better."""
  plan, say = loop.plan, loop.show.say
  say(
    f'{plan.config.name}: {parameters:,} parameters on {plan.mesh.size} '
    f'{jax.devices()[0].device_kind}, step {loop.done} of {loop.last}'
    + (', compiling' if loop.done < loop.last else '')
  )
  if loop.done == loop.last:
    say(
      f'nothing to train: the run in {plan.workdir} has {loop.done} steps '
      f'already, and train.steps={plan.config.train.steps}; more of them go on'
    )
  untrained = _untrained(plan)
  if untrained:
    say(
      f'levels of periods {untrained} write nothing that a row of '
      f'{plan.config.data.length} tokens still reads, so their inner rates are '
      'not trained; give longer rows (data.length) or train.carry_state=True'
    )
  if jax.process_count() > plan.config.data.shards:
    say(
      f'data.shards is {plan.config.data.shards}: some of the '
      f'{jax.process_count()} processes read and tokenise the same text. '
      'One shard a process shares it out; a run keeps the number it began '
      'with'
    )


def _untrained(plan: Plan) -> str:
  """Periods of levels that no row is long enough to learn from."""
  stream, length = plan.model.cfg.stream, plan.config.data.length
  periods = stream.periods if stream and plan.carried is None else ()
  return ', '.join(str(period) for period in periods if period >= length)


def _sum_up(
  loop: loops.Loop, final: dict[str, float], bigram: float, began: float
) -> None:
  """Draws, and shows what came out; `began` is of `time.perf_counter`."""
  plan, log = loop.plan, loop.log
  if jax.process_index() == 0:
    ending.draw(plan, log, bigram)
  kept = loop.checkpoints.steps()
  rows = ending.summary(plan, log, final, loop.last, bigram, kept)
  rows += ending.speed(loop.speed)
  rows.append(('time', progress.clock(time.perf_counter() - began)))
  if loop.last > loop.done:
    rows.append(('of it', loop.spent.words()))
  rows += ending.levels(plan, final) + ending.files(plan.workdir)
  progress.summarise(rows, f'{plan.config.name}: done')
  distributed.told('')  # nobody leaves while the first is drawing


def _speed(config, cfg: ModelConfig) -> metrics.Speed:
  tokens = config.train.batch * config.data.length
  # One forward and two backward products a matmul; recomputation not counted.
  flops = 3 * language_model.flops_per_token(cfg, config.data.length)
  device = jax.devices()[0].device_kind
  peak = config.log.peak_flops or metrics.peak_flops(device)
  return metrics.Speed(tokens, flops, peak and peak * jax.device_count())
