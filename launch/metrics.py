"""What a run measured: JSON lines, TensorBoard, tokens a second, MFU."""

import json
import math
import os
import pathlib
import time

import numpy as np
import tensorboardX

# Dense bf16 FLOP/s of one device, by the beginning of its kind.
PEAK_FLOPS = (
  ('NVIDIA H100', 989e12),
  ('NVIDIA H200', 989e12),
  ('NVIDIA A100', 312e12),
  ('TPU v4', 275e12),
  ('TPU v5 lite', 197e12),
  ('TPU v5e', 197e12),
  ('TPU v5', 459e12),
  ('TPU v6 lite', 918e12),
  ('TPU v6e', 918e12),
)


def peak_flops(device_kind: str) -> float | None:
  """Peak FLOP/s of a device, or None where it is not known (CPUs)."""
  for kind, flops in PEAK_FLOPS:
    if device_kind.startswith(kind):
      return flops
  return None


class Log:
  """`metrics.jsonl` and TensorBoard of a workdir, in step with a checkpoint.

  A row has `step`, `split` ('train' or 'valid') and numbers; a number that is
  not finite is null. No step appears twice in a split: what a run wrote after
  the checkpoint that it resumes from is taken out before it writes again.
  """

  def __init__(self, workdir, step: int, write: bool = True):
    """Opens the files for a run that goes on after `step`.

    Args:
      workdir: of the run, a local or shared folder.
      step: of the checkpoint resumed from; 0 for none.
      write: False on all processes but the first, which then write nothing.
    """
    workdir = pathlib.Path(workdir)
    self._file, self._board = None, None
    self._path = workdir / 'metrics.jsonl'
    self.rows = [row for row in read(self._path) if row['step'] <= step]
    if write:
      _replace(self._path, self.rows)
      self._file = self._path.open('a')
      self._board = tensorboardX.SummaryWriter(
        str(workdir / 'tensorboard'), purge_step=step + 1
      )

  def write(self, step: int, split: str, numbers: dict[str, float]) -> None:
    """Adds a row; it is on its way to the disk when this returns."""
    row = {'step': step, 'split': split} | {
      name: value if math.isfinite(value) else None
      for name, value in numbers.items()
    }
    self.rows.append(row)
    if self._file is None:
      return
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    for name, value in numbers.items():
      self._board.add_scalar(f'{split}/{name}', value, step)

  def last(self, split: str, step: int) -> dict | None:
    """The row of a split at a step, if there is one."""
    rows = (r for r in reversed(self.rows) if r['split'] == split)
    return next((row for row in rows if row['step'] == step), None)

  def sync(self) -> None:
    """Puts the rows on the disk before a checkpoint that counts on them."""
    if self._file is not None:
      os.fsync(self._file.fileno())
      self._board.flush()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()


def read(path) -> list[dict]:
  """Reads the rows of a `metrics.jsonl`, without one cut short."""
  path = pathlib.Path(path)
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue  # the process was killed while it wrote
  return rows


def _replace(path: pathlib.Path, rows: list[dict]) -> None:
  fresh = path.with_suffix('.new')
  fresh.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  fresh.replace(path)


LEVEL = ('commits', 'moved', 'size', 'rate')


def of_levels(said, rates) -> dict[str, float]:
  """Names what levels did: `surprise`, `level_0_moved` and so on.

  Args:
    said: `models.telemetry.Telemetry` of one batch or more, on the host.
    rates: inner learning rates of each level, one a block.

  Returns:
    For each level, the fastest 0, of the sequences' ends the mean number of
    `commits` and the norms of the last update (`moved`) and of all that is
    written (`size`); of its blocks the geometric mean `rate`. `surprise` is
    in nats a token for the objective next_token. Empty without levels.
  """
  if not rates or not said:
    return {}

  def mean(values):
    return np.average(values, weights=[one.rows for one in said])

  numbers = {'surprise': float(mean([one.surprise for one in said]))}
  for k, rate_n in enumerate(rates):
    values = [
      mean([part[k] for part in parts])
      for parts in zip(
        *((one.commits_P, one.moved_P, one.size_P) for one in said)
      )
    ]
    values.append(np.exp(np.mean(np.log(rate_n))))
    names = (f'level_{k}_{name}' for name in LEVEL)
    numbers |= dict(zip(names, map(float, values)))
  return numbers


class Speed:
  """Tokens a second, without compilation, evaluation and checkpoints."""

  def __init__(self, tokens: int, flops: float, peak: float | None):
    """Starts no clock yet; `start` does.

    Args:
      tokens: a step, on all devices.
      flops: of training, a token.
      peak: FLOP/s of all devices together, None where it is not known.
    """
    self._tokens, self._flops, self._peak = tokens, flops, peak
    self._since: tuple[int, float] | None = None
    self._steps, self._seconds = 0, 0.0

  def start(self, step: int) -> None:
    """Starts the clock at the end of a step, after whatever is not training."""
    self._since = step, time.perf_counter()

  def read(self, step: int) -> dict[str, float]:
    """Numbers since the last `start` or `read`; none if no step was made."""
    if self._since is None or step == self._since[0]:
      return {}
    then, now = self._since, time.perf_counter()
    self._since = step, now
    self._steps += step - then[0]
    self._seconds += now - then[1]
    return self._numbers(step - then[0], now - then[1])

  def total(self) -> dict[str, float]:
    """Numbers of all that was read so far."""
    return self._numbers(self._steps, self._seconds) if self._steps else {}

  def _numbers(self, steps: int, seconds: float) -> dict[str, float]:
    rate = steps * self._tokens / seconds
    numbers = {'tokens_per_second': rate}
    if self._peak:
      numbers['mfu'] = rate * self._flops / self._peak
    return numbers
