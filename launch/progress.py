"""What a run shows while it goes on, and what it says at the end."""

import sys
import time

import jax
from rich import console as rich_console
from rich import progress as rich_progress
from rich import table as rich_table


def show(done: int, steps: int, every: int):
  """A bar on a terminal, plain lines elsewhere, nothing off process 0.

  Args:
    done: steps that were made before.
    steps: of the whole run.
    every: steps between two plain lines.

  Returns:
    An object with `update(step, numbers)`, `say(line)` and `close()`.
  """
  if jax.process_index():
    return Silence()
  if sys.stdout.isatty():
    return Bar(done, steps)
  return Lines(steps, every)


class Silence:
  """Shows nothing: the first process speaks for all."""

  def update(self, step: int, numbers: dict[str, float]) -> None:
    del step, numbers

  def say(self, line: str) -> None:
    del line

  def close(self) -> None:
    pass


class Lines:
  """A line every so many steps, for logs."""

  def __init__(self, steps: int, every: int):
    self._steps, self._every = steps, every
    self._first: tuple[int, float] | None = None

  def update(self, step: int, numbers: dict[str, float]) -> None:
    """Prints the step's numbers if it is its turn."""
    now = time.perf_counter()
    if self._first is None:
      self._first = step, now  # the first step is mostly compilation
    if step % self._every and step != self._steps:
      return
    line = f'step {step}/{self._steps}  {_words(numbers)}'
    first, then = self._first
    if step > first:
      left = (now - then) / (step - first) * (self._steps - step)
      line += f'  {clock(left)} left'
    self.say(line)

  def say(self, line: str) -> None:
    print(line, flush=True)

  def close(self) -> None:
    pass


class Bar:
  """One line at the bottom of the terminal; what is said scrolls above it."""

  def __init__(self, done: int, steps: int):
    self._bar = rich_progress.Progress(
      rich_progress.MofNCompleteColumn(),
      rich_progress.BarColumn(bar_width=24),
      rich_progress.TextColumn('{task.fields[words]}'),
      rich_progress.TimeRemainingColumn(),
    )
    words = 'compiling' if done < steps else ''
    self._task = self._bar.add_task(
      '', total=steps, completed=done, words=words
    )
    self._known: dict[str, float] = {}
    self._bar.start()

  def update(self, step: int, numbers: dict[str, float]) -> None:
    """Moves the bar to the step; shows its numbers, and the last speed."""
    self._known |= numbers
    self._bar.update(self._task, completed=step, words=_words(self._known))

  def say(self, line: str) -> None:
    self._bar.console.print(line, markup=False, highlight=False)

  def close(self) -> None:
    self._bar.stop()


def _words(numbers: dict[str, float]) -> str:
  words = [
    f'loss {numbers["loss"]:.4f}',
    f'{numbers["bits_per_byte"]:.4f} bits/byte',
  ]
  if 'tokens_per_second' in numbers:
    words.append(f'{numbers["tokens_per_second"]:,.0f} tokens/s')
  if 'mfu' in numbers:
    words.append(f'MFU {numbers["mfu"]:.1%}')
  if numbers.get('skipped'):
    words.append(f'{numbers["skipped"]:.0f} skipped')
  return '  '.join(words)


def clock(seconds: float) -> str:
  """Writes `75` as `1:15` and `4000` as `1:06:40`."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02}:{seconds:02}'
  return f'{minutes}:{seconds:02}'


def summarise(rows: list[tuple[str, str]], title: str) -> None:
  """Prints names and values as a table, or as lines where it is no terminal."""
  if jax.process_index():
    return
  console = rich_console.Console()
  if not console.is_terminal:
    print(title)
    for name, value in rows:
      print(f'  {name}: {value}')
    return
  table = rich_table.Table(title=title, show_header=False)
  for name, value in rows:
    table.add_row(name, value)
  console.print(table)


def level(numbers: dict[str, float], k: int) -> str:
  """Says what level k did, from the numbers of `metrics.of_levels`."""
  commits, moved, size, rate = (
    numbers[f'level_{k}_{name}']
    for name in ('commits', 'moved', 'size', 'rate')
  )
  return (
    f'{commits:.1f} commits a row, inner rate {rate:.3g}, written {size:.3g} '
    f'(last update {moved:.3g})'
  )
