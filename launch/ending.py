"""What a run leaves when it is done: plots, a sample, and a few rows."""

import jax

from nestax.launch import metrics, plots, progress, sampling
from nestax.launch.data import tokenizers
from nestax.launch.prepare import Plan


def write_sample(plan: Plan, params) -> None:
  """Lets the model write `sample.txt`, as the config's `log` wants it.

  A run of several processes says instead which command writes one: parameters
  that are spread over hosts are not there to be read on one of them.
  """
  config = plan.config
  if not config.log.sample_tokens:
    return
  if jax.process_count() > 1:
    if jax.process_index() == 0:
      print(
        'no sample.txt from several processes; `nestax-generate '
        f'--workdir={plan.workdir}` on one host writes text'
      )
    return
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


def draw(plan: Plan, log: metrics.Log, bigram: float) -> None:
  """Draws `loss.png` and, of a model with levels, `levels.png`."""
  name, stream = plan.config.name, plan.model.cfg.stream
  path = plan.workdir / 'loss.png'
  plots.loss_curve(log.rows, path, bigram, f'{name}: bits per byte')
  if stream:
    title = f'{name}: levels at the end of a validation row'
    path = plan.workdir / 'levels.png'
    plots.trained_levels(log.rows, stream.periods, path, title)


def summary(
  plan: Plan,
  log: metrics.Log,
  final: dict[str, float],
  last: int,
  bigram: float,
  kept: list[int],
) -> list[tuple[str, str]]:
  """Names and values of what came out.

  Args:
    plan: of the run.
    log: its metrics.
    final: the last validation.
    last: the last step.
    bigram: bits per byte of the validation bytes under their own bigrams.
    kept: steps of the checkpoints that are there.
  """
  train = log.last('train', last) or {}
  rows = [
    ('steps', f'{last:,} ({train.get("skipped") or 0:.0f} skipped)'),
    ('train loss', f'{train.get("loss") or float("nan"):.4f} nats/token'),
    ('validation loss', f'{final["loss"]:.4f} nats/token'),
    ('validation', f'{final["bits_per_byte"]:.4f} bits/byte'),
    ('bigram entropy of the same bytes', f'{bigram:.4f} bits/byte'),
  ]
  if plan.config.checkpoint.keep_best:
    rows += _best(log, kept)
  return rows


def speed(measured: metrics.Speed) -> list[tuple[str, str]]:
  """Tokens a second and, where it is known, MFU."""
  rate = measured.total()
  rows = []
  if rate:
    rows.append(('speed', f'{rate["tokens_per_second"]:,.0f} tokens/s'))
  if 'mfu' in rate:
    rows.append(('MFU', f'{rate["mfu"]:.1%}'))
  return rows


def levels(plan: Plan, final: dict[str, float]) -> list[tuple[str, str]]:
  """What each level did in the last validation."""
  stream = plan.model.cfg.stream
  return [
    (f'level every {period}', progress.level(final, k))
    for k, period in enumerate(stream.periods if stream else ())
  ]


def files(workdir) -> list[tuple[str, str]]:
  """The names and paths of what lies in the workdir."""
  names = (
    'loss.png',
    'levels.png',
    'sample.txt',
    'metrics.jsonl',
    'profile',
    'checkpoints',
  )
  there = [workdir / name for name in names if (workdir / name).exists()]
  return [(path.name, str(path)) for path in there]


def _best(log: metrics.Log, kept: list[int]) -> list[tuple[str, str]]:
  """The checkpoint with the least bits per byte on validation."""
  known = {
    row['step']: row['bits_per_byte']
    for row in log.rows
    if row['split'] == 'valid' and row['bits_per_byte'] is not None
  }
  found = [(known[step], step) for step in kept if step in known]
  if not found:
    return []
  bits, step = min(found)
  return [('best checkpoint', f'{step} ({bits:.4f} bits/byte)')]
