"""A long text read several ways: levels on, off, reset; a table and a plot."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich import console, table
from rich import progress as bars

from nestax.launch import plots, sampling, trained
from nestax.launch.evals import streaming
from nestax.models import language_model, stacking
from nestax.models.continuum import CMSConfig


class Stack(NamedTuple):
  """How the MLPs of a pretrained Transformer become levels; '' for not."""

  how: str
  periods: tuple[str, ...]
  blocks: str
  rate: float


def modes(
  names: Sequence[str], piece: int, window: int
) -> dict[str, streaming.Settings]:
  """Settings for 'on', 'off' and 'reset:TOKENS'.

  Raises:
    ValueError: for another word, or numbers that do not fit.
  """
  settings = {}
  for name in names:
    word, _, tokens = name.partition(':')
    if word == 'reset' and tokens.isdigit() and int(tokens):
      levels, reset = 'on', int(tokens)
    elif name in ('on', 'off'):
      levels, reset = name, 0
    else:
      raise ValueError(
        f'--levels={name}: on, off or reset:TOKENS, such as reset:8192'
      )
    settings[name] = streaming.Settings(levels, reset, piece, window)
  if not settings:
    raise ValueError('--levels is empty: on, off or reset:TOKENS')
  return settings


def load(
  workdir: str | None,
  model: str | None,
  stack: Stack,
  dtype: str | None = None,
  owner: str = '',
) -> trained.Trained:
  """Loads a run's model, or a pretrained one, stacked if that is asked for.

  Args:
    workdir: of a run; None for a pretrained model.
    model: file of a pretrained model; None for a run's.
    stack: of the pretrained model.
    dtype: that it computes in; None for the run's own, and for float32.
    owner: of a life, whose slots to take; '' for nobody's.

  Raises:
    ValueError: if both or neither are named, or the stack does not fit.
  """
  if (workdir is None) == (model is None):
    raise ValueError('give --workdir=RUN or --model=FILE, one of them')
  if workdir is not None:
    if stack.how:
      raise ValueError('--stack is for a pretrained --model')
    return _computing(trained.load(workdir, owner=owner), dtype)
  trained.refuse_owner(owner)
  periods = _periods(stack)  # before what takes long
  made = _computing(trained.load_pretrained(model), dtype)
  if not stack.how:
    return made
  cms = CMSConfig(periods=periods, blocks=stack.blocks, rate=stack.rate)
  cfg, params = stacking.stack(made.model.cfg, made.params, stack.how, cms)
  return made._replace(model=language_model.LanguageModel(cfg), params=params)


def _periods(stack: Stack) -> tuple[int, ...]:
  """The periods as numbers, of a stack whose words are right."""
  if not stack.how:
    return ()
  if stack.how not in stacking.HOW:
    raise ValueError(f'--stack={stack.how}: one of {", ".join(stacking.HOW)}')
  try:
    return tuple(int(word) for word in stack.periods)
  except ValueError:
    raise ValueError(
      f'--periods={",".join(stack.periods)}: whole numbers of tokens'
    ) from None


def _computing(made: trained.Trained, dtype: str | None) -> trained.Trained:
  if not dtype:
    return made
  cfg = dataclasses.replace(made.model.cfg, dtype=dtype)
  return made._replace(model=language_model.LanguageModel(cfg))


def run(
  made: trained.Trained,
  text: str,
  settings: Mapping[str, streaming.Settings],
  out,
  limit: int = 0,
) -> dict[str, dict[str, float]]:
  """Reads the text once for every setting; writes and prints what came of it.

  Leaves in `out`: `stream.jsonl`, a line for every call of every setting,
  `summary.json` and `stream.png`.

  Args:
    made: model, parameters and tokenizer.
    text: path of a UTF-8 file.
    settings: name -> how to read.
    out: folder, made if it is not there.
    limit: most tokens to read; 0 for all.

  Raises:
    ValueError: if no level of the model learns, but some setting wants it to.
  """
  if made.model.cfg.stream is None:
    wrong = [name for name in settings if name != 'off']
    if wrong:
      raise ValueError(
        f'--levels={",".join(wrong)}: no level of this model learns; '
        '--levels=off, a run trained with --config.model.cms.blocks=..., or '
        '--stack=groups for a pretrained model'
      )
  tokens = made.tokenizer.encode(sampling.read_prompt('', text, '--text'))
  tokens = np.asarray(tokens, np.int32)[: limit or None]
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  readings, summaries = {}, {}
  for name, how in settings.items():
    began = time.perf_counter()
    readings[name] = read(made, tokens, name, how)
    seconds = time.perf_counter() - began
    summaries[name] = streaming.summary(readings[name])
    summaries[name]['tokens_per_second'] = len(tokens) / seconds
  with (out / 'stream.jsonl').open('w') as file:
    for name, rows in readings.items():
      for row in rows:
        file.write(json.dumps({'levels': name} | _plain(row)) + '\n')
  (out / 'summary.json').write_text(json.dumps(summaries, indent=2) + '\n')
  plots.levels(readings, periods(made.model), out / 'stream.png', text)
  _show(summaries, out)
  return summaries


def periods(model) -> tuple[int, ...]:
  """Tokens between commits of each level that learns, fastest first."""
  return model.cfg.stream.periods if model.cfg.stream else ()


def read(
  made: trained.Trained,
  tokens: np.ndarray,
  name: str,
  how: streaming.Settings,
) -> list[streaming.Reading]:
  """Reads tokens under a progress bar of that name; see `streaming.read`."""
  columns = (
    *bars.Progress.get_default_columns(),
    bars.TextColumn('{task.fields[said]}'),
  )
  with bars.Progress(*columns, console=console.Console(stderr=True)) as bar:
    task = bar.add_task(name, total=len(tokens) - 1, said='')
    sizes = made.tokenizer.byte_lengths
    # ids the model has and the tokenizer lacks stand for no bytes
    sizes = np.pad(sizes, (0, max(0, made.model.cfg.V - len(sizes))))

    def show(reading):
      rate = reading.nats / max(reading.bytes, 1.0) / np.log(2)
      # the table's figure is of the whole text
      said = f'last piece: {rate:.3f} bits/byte'
      bar.update(task, completed=reading.tokens, said=said)

    return list(
      streaming.read(made.model, made.params, tokens, sizes, how, show)
    )


def _plain(reading: streaming.Reading) -> dict:
  return {
    name: value.tolist() if isinstance(value, np.ndarray) else value
    for name, value in reading._asdict().items()
  }


def _show(summaries, out) -> None:
  grid = table.Table('levels', 'perplexity', 'bits/byte', 'tokens', 'tokens/s')
  for name, row in summaries.items():
    grid.add_row(
      name,
      f'{row["perplexity"]:.3f}',
      f'{row["bits_per_byte"]:.4f}',
      f'{row["tokens"]:,.0f}',
      f'{row["tokens_per_second"]:,.0f}',
    )
  console.Console().print(grid)
  print(f'stream.jsonl, summary.json and stream.png are in {out}')
