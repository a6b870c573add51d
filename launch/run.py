"""The training loop, from a config to a trained model, top to bottom."""

import contextlib
import functools
import json
import signal
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np

from nestax.launch import (
  checkpoint,
  distributed,
  ending,
  goodput,
  lock,
  loss,
  metrics,
  profile,
  progress,
)
from nestax.launch import mesh as meshes
from nestax.launch import step as steps
from nestax.launch.data import corpora, pipeline
from nestax.launch.prepare import Plan
from nestax.launch.prepare import prepare as prepare
from nestax.launch.signals import Agreement, Interrupted, Signals
from nestax.models import language_model
from nestax.models.config import ModelConfig


class BadSteps(RuntimeError):
  """Too many steps in a row had a loss or a gradient that is not finite."""


# What ends a run that was well begun, each in words.
FAILURES = (
  BadSteps,
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
    with distributed.others_needed():
      return _train(plan)


def _train(plan: Plan) -> dict[str, float]:
  config, cfg = plan.config, plan.model.cfg
  process = jax.process_index()
  say = print if process == 0 else lambda line: None
  began, spent = time.perf_counter(), goodput.Goodput()

  # ---- data
  part = meshes.part(plan.mesh, config.train.batch)
  data = pipeline.train_iterator(config, part.rows)
  valid = pipeline.valid_batches(config, part.rows)
  bigram = pipeline.bigram_bits_per_byte(config)

  with jax.set_mesh(plan.mesh), Signals() as signals:
    # ---- state: from the newest readable checkpoint, or fresh
    abstract, train_step = plan.program()
    checkpoints = checkpoint.Checkpoints(plan.workdir, config, say)
    state = checkpoints.restore(abstract, data)
    if state is None:
      state = steps.init_state(
        plan.model, plan.tx, plan.mesh, config.seed, plan.carried, plan.params
      )
    done = int(state.step)
    last = max(config.train.steps, done)

    lay = functools.partial(meshes.put, plan.mesh, part=part)
    agreed = Agreement(plan.mesh)
    evaluate = functools.partial(
      _evaluate,
      cfg,
      steps.eval_step(plan.model, config.train.loss_piece),
      lambda: map(lay, valid),
      lambda: agreed(signals.received),
      spent,
    )

    # ---- what is written and shown
    log = metrics.Log(plan.workdir, done, write=process == 0)
    speed = _speed(config, cfg)
    show = progress.show(done, last, config.log.every)
    report = functools.partial(
      _report, config, log, speed, spent, show, done, last
    )
    traced = profile.Profile(config.profile, plan.workdir, done, show.say)
    parameters = sum(x.size for x in jax.tree.leaves(abstract.params))
    show.say(
      f'{config.name}: {parameters:,} parameters on {plan.mesh.size} '
      f'{jax.devices()[0].device_kind}, step {done} of {last}'
    )
    if jax.process_count() > config.data.shards:
      show.say(
        f'data.shards is {config.data.shards}: some of the '
        f'{jax.process_count()} processes read and tokenise the same text. '
        'One shard a process shares it out; a run keeps the number it began '
        'with'
      )

    # ---- steps
    late = None  # metrics are read when the step after is under way
    try:
      # A run that was stopped where it should have evaluated does so now.
      stop = 0
      missed = _due(done, config.eval.every, last) and done > 0
      missed = missed and log.last('valid', done) is None
      if distributed.told('missed' if missed else ''):
        found, stop = evaluate(state.params)
        if found:
          log.write(done, 'valid', found)
      if stop:
        raise _interrupted(stop, done, plan.workdir)

      for number in range(done + 1, last + 1):
        spent.turn('data')
        batch = lay(next(data))
        spent.call('train step', 'compute')
        with traced.step(number), jax.transfer_guard('disallow'):
          state, fresh = train_step(state, batch)
        spent.turn('compute')
        traced.after(number, fresh)
        if late:
          report(*late)
        late = number, fresh
        stop = agreed(signals.received)
        evaluating = _due(number, config.eval.every, last)
        saving = _due(number, config.checkpoint.every, last)
        if not (stop or evaluating or saving):
          continue

        numbers, found = report(*late), None
        late = None
        if evaluating and not stop:
          found, stop = evaluate(state.params)
        if found:
          log.write(number, 'valid', found)
        spent.turn('checkpoint')
        # A state in the middle of bad steps must not push out better ones.
        if stop or (saving and not numbers['bad']):
          log.sync()
          bits = found and found['bits_per_byte']
          checkpoints.save(number, state, data, bits)
        else:
          checkpoints.check()
        if stop:
          checkpoints.wait()
          raise _interrupted(stop, number, plan.workdir)
        speed.start(number)
      spent.turn('checkpoint')
      checkpoints.wait()
      spent.turn('other')
      if last > done and int(state.skipped) >= last:
        raise BadSteps(
          f'all {last} steps had a loss, gradient or parameters that are not '
          'finite: nothing was learned. A lower opt.lr or a longer opt.warmup '
          'may help'
        )
    except jax.errors.JaxRuntimeError:
      checkpoints.abandon()
      raise
    finally:
      traced.close()
      show.close()
      log.close()
      data.close()
      checkpoints.close()

    # ---- end
    final = json.loads(distributed.told(json.dumps(log.last('valid', last))))
    if process == 0:
      ending.write_sample(plan, state.params)

  if process == 0:
    ending.draw(plan, log, bigram)
  rows = ending.summary(plan, log, final, last, bigram, checkpoints.steps())
  rows += ending.speed(speed)
  rows.append(('time', progress.clock(time.perf_counter() - began)))
  rows.append(('of it', spent.words()))
  rows += ending.levels(plan, final) + ending.files(plan.workdir)
  progress.summarise(rows, f'{config.name}: done')
  distributed.told('')  # nobody leaves while the first is drawing
  names = ('loss', 'bits_per_byte')
  return {name: final[name] for name in names} | {'bigram': bigram}


def _interrupted(number: int, step: int, workdir) -> Interrupted:
  return Interrupted(
    f'{signal.Signals(number).name}: saved checkpoint {step} in {workdir}; '
    'the same command goes on from there',
    number,
  )


def _due(number: int, every: int, last: int) -> bool:
  return number == last or (every > 0 and number % every == 0)


def _speed(config, cfg: ModelConfig) -> metrics.Speed:
  tokens = config.train.batch * config.data.length
  # One forward and two backward products a matmul; recomputation not counted.
  flops = 3 * language_model.flops_per_token(cfg, config.data.length)
  device = jax.devices()[0].device_kind
  peak = config.log.peak_flops or metrics.peak_flops(device)
  return metrics.Speed(tokens, flops, peak and peak * jax.device_count())


def _report(config, log, speed, spent, show, done, last, number, fresh):
  """Reads a step's metrics, writes and shows them, and stops at bad ones."""
  numbers = {k: float(v) for k, v in jax.device_get(fresh).items()}
  if number == done + 1:
    speed.start(number)  # the first step is mostly compilation
  if _due(number, config.log.every, last):
    numbers |= speed.read(number)
    log.write(number, 'train', numbers | spent.read())
  show.update(number, numbers)
  if numbers['bad'] >= config.train.max_bad_steps:
    raise BadSteps(
      f'{numbers["bad"]:.0f} steps in a row up to step {number} had a loss or '
      'gradient that is not finite: stopped. Checkpoints from before are '
      'kept; a lower opt.lr, a longer opt.warmup or a lower opt.clip may help'
    )
  return numbers


def _evaluate(
  cfg: ModelConfig,
  step,
  batches: Callable[[], Iterable[dict]],
  stopped: Callable[[], int],
  spent: goodput.Goodput,
  params,
) -> tuple[dict[str, float] | None, int]:
  """Means over all validation batches, summed in float64.

  A signal ends it early: gives nothing, then, and the signal's number.
  """
  total = loss.Sums(*np.zeros(len(loss.Sums._fields)))
  levels = []
  for batch in batches():
    spent.call('evaluation', 'evaluate')
    fresh = step(params, batch)
    spent.turn('evaluate')
    sums, moved = jax.device_get(fresh)
    total = jax.tree.map(lambda a, b: a + np.float64(b), total, sums)
    levels.append(moved)
    if stop := stopped():
      return None, stop
  numbers = {name: float(value) for name, value in loss.means(total).items()}
  rates = jax.device_get(language_model.inner_rates(cfg, params))
  return numbers | metrics.of_levels(levels, rates), 0
