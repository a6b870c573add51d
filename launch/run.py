"""The training loop, from a config to a trained model, top to bottom."""

import functools
import signal
import time
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from nestax.launch import (
  checkpoint,
  lock,
  loss,
  metrics,
  plots,
  progress,
  sampling,
)
from nestax.launch import mesh as meshes
from nestax.launch import step as steps
from nestax.launch.data import corpora, pipeline, tokenizers
from nestax.launch.prepare import Plan
from nestax.launch.prepare import prepare as prepare
from nestax.launch.signals import Interrupted, Signals, agreed
from nestax.models import language_model
from nestax.models.config import ModelConfig


class BadSteps(RuntimeError):
  """Too many steps in a row had a loss or a gradient that is not finite."""


# What ends a run that was well begun, each in words.
FAILURES = (BadSteps, checkpoint.CheckpointError, corpora.DataError)


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
  """
  with lock.held(plan.workdir, take=jax.process_index() == 0):
    return _train(plan)


def _train(plan: Plan) -> dict[str, float]:
  config, cfg = plan.config, plan.model.cfg
  process, processes = jax.process_index(), jax.process_count()
  say = print if process == 0 else lambda line: None
  began = time.perf_counter()

  # ---- data
  data = pipeline.train_iterator(config, process, processes)
  valid = pipeline.valid_batches(config, process, processes)
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

    eval_step = steps.eval_step(plan.model, config.train.loss_piece)
    evaluate = functools.partial(_evaluate, cfg, eval_step, plan.mesh, valid)

    # ---- what is written and shown
    log = metrics.Log(plan.workdir, done, write=process == 0)
    speed = _speed(config, cfg)
    show = progress.show(done, last, config.log.every)
    report = functools.partial(_report, config, log, speed, show, done, last)
    parameters = sum(x.size for x in jax.tree.leaves(abstract.params))
    show.say(
      f'{config.name}: {parameters:,} parameters on {plan.mesh.size} '
      f'{jax.devices()[0].device_kind}, step {done} of {last}'
    )

    # ---- steps
    late = None  # metrics are read when the step after is under way
    try:
      for number in range(done + 1, last + 1):
        batch = meshes.put(plan.mesh, next(data))
        with jax.transfer_guard('disallow'):
          state, fresh = train_step(state, batch)
        if late:
          report(*late)
        late = number, fresh
        stop = agreed(signals.received, number, config.log.every)
        evaluating = _due(number, config.eval.every, last)
        saving = _due(number, config.checkpoint.every, last)
        if not (stop or evaluating or saving):
          continue

        numbers = report(*late)
        late = None
        if evaluating:
          log.write(number, 'valid', evaluate(state.params))
        # A state in the middle of bad steps must not push out better ones.
        if stop or (saving and not numbers['bad']):
          log.sync()
          checkpoints.save(number, state, data)
        else:
          checkpoints.check()
        if stop:
          checkpoints.wait()
          raise Interrupted(
            f'{signal.Signals(stop).name}: saved checkpoint {number} in '
            f'{plan.workdir}; the same command goes on from there',
            stop,
          )
        speed.start(number)
      checkpoints.wait()
      if last > done and int(state.skipped) >= last:
        raise BadSteps(
          f'all {last} steps had a loss, gradient or parameters that are not '
          'finite: nothing was learned. A lower opt.lr or a longer opt.warmup '
          'may help'
        )
    finally:
      show.close()
      log.close()
      data.close()
      checkpoints.close()

    # ---- end
    final = log.last('valid', last) or evaluate(state.params)

    # One process only: others could not read parameters that are spread out.
    if config.log.sample_tokens and processes == 1:
      _write_sample(plan, state.params)

  if process == 0:
    title = f'{config.name}: bits per byte'
    plots.loss_curve(log.rows, plan.workdir / 'loss.png', bigram, title)
    if cfg.stream:
      picture = plan.workdir / 'levels.png'
      title = f'{config.name}: levels at the end of a validation row'
      plots.trained_levels(log.rows, cfg.stream.periods, picture, title)
  seconds = time.perf_counter() - began
  periods = cfg.stream.periods if cfg.stream else ()
  rows = _summary(
    log, last, final, bigram, speed, seconds, plan.workdir, periods
  )
  progress.summarise(rows, f'{config.name}: done')
  names = ('loss', 'bits_per_byte')
  return {name: final[name] for name in names} | {'bigram': bigram}


def _due(number: int, every: int, last: int) -> bool:
  return number == last or (every > 0 and number % every == 0)


def _speed(config, cfg: ModelConfig) -> metrics.Speed:
  tokens = config.train.batch * config.data.length
  # One forward and two backward products a matmul; recomputation not counted.
  flops = 3 * language_model.flops_per_token(cfg, config.data.length)
  device = jax.devices()[0].device_kind
  peak = config.log.peak_flops or metrics.peak_flops(device)
  return metrics.Speed(tokens, flops, peak and peak * jax.device_count())


def _report(config, log, speed, show, done, last, number, fresh):
  """Reads a step's metrics, writes and shows them, and stops at bad ones."""
  numbers = {k: float(v) for k, v in jax.device_get(fresh).items()}
  if number == done + 1:
    speed.start(number)  # the first step is mostly compilation
  if _due(number, config.log.every, last):
    numbers |= speed.read(number)
    log.write(number, 'train', numbers)
  show.update(number, numbers)
  if numbers['bad'] >= config.train.max_bad_steps:
    raise BadSteps(
      f'{numbers["bad"]:.0f} steps in a row up to step {number} had a loss or '
      'gradient that is not finite: stopped. Checkpoints from before are '
      'kept; a lower opt.lr, a longer opt.warmup or a lower opt.clip may help'
    )
  return numbers


def _evaluate(
  cfg: ModelConfig, step, mesh: Mesh, batches: Iterable[dict], params
) -> dict[str, float]:
  """Means over all validation batches, summed in float64."""
  total = loss.Sums(*np.zeros(len(loss.Sums._fields)))
  levels = []
  for batch in batches:
    sums, moved = jax.device_get(step(params, meshes.put(mesh, batch)))
    total = jax.tree.map(lambda a, b: a + np.float64(b), total, sums)
    levels.append(moved)
  numbers = {name: float(value) for name, value in loss.means(total).items()}
  rates = jax.device_get(language_model.inner_rates(cfg, params))
  return numbers | metrics.of_levels(levels, rates)


def _write_sample(plan: Plan, params) -> None:
  config = plan.config
  pieces = sampling.text(
    plan.model,
    params,
    tokenizers.load(config.data.tokenizer),
    config.log.prompt,
    config.log.sample_tokens,
    sampling.Sampling(seed=config.seed),
  )
  text = config.log.prompt + ''.join(pieces) + '\n'
  (plan.workdir / 'sample.txt').write_text(text, encoding='utf-8')


def _summary(
  log, last, final, bigram, speed, seconds, workdir, periods
) -> list[tuple[str, str]]:
  train = log.last('train', last) or {}
  rate = speed.total()
  rows = [
    ('steps', f'{last:,} ({train.get("skipped") or 0:.0f} skipped)'),
    ('train loss', f'{train.get("loss") or float("nan"):.4f} nats/token'),
    ('validation loss', f'{final["loss"]:.4f} nats/token'),
    ('validation', f'{final["bits_per_byte"]:.4f} bits/byte'),
    ('bigram entropy of the same bytes', f'{bigram:.4f} bits/byte'),
  ]
  if rate:
    rows.append(('speed', f'{rate["tokens_per_second"]:,.0f} tokens/s'))
  if 'mfu' in rate:
    rows.append(('MFU', f'{rate["mfu"]:.1%}'))
  rows.append(('time', progress.clock(seconds)))
  for k, period in enumerate(periods):
    rows.append((f'level every {period}', progress.level(final, k)))
  files = (
    'loss.png',
    'levels.png',
    'sample.txt',
    'metrics.jsonl',
    'checkpoints',
  )
  there = [workdir / name for name in files if (workdir / name).exists()]
  return rows + [(path.name, str(path)) for path in there]
