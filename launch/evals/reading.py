"""A novel read by models with more and more levels: cells, and their table."""

import pathlib
from collections.abc import Callable

import numpy as np

from nestax.launch import sampling, trained
from nestax.launch.benches import timing
from nestax.launch.evals import cells, novel, streaming
from nestax.models import language_model


def pick(
  stacks: dict[float, trained.Trained], tokens: np.ndarray, window: int
) -> tuple[trained.Trained, dict]:
  """Gives the model whose inner rate reads the tokens best, and the rate."""
  nats = {
    rate: read(made, tokens, 'on', window)['nats']
    for rate, made in stacks.items()
  }
  best = min(nats, key=nats.get)
  return stacks[best], {'picked': best, 'tried': sorted(nats)}


def read(made, tokens: np.ndarray, levels: str, window: int) -> dict:
  """Reads a text once, the state carried along; see `streaming.summary`."""
  settings = streaming.Settings(levels, 0, min(1024, window), window)
  return streaming.summary(novel.read(made, tokens, levels, settings))


def cell(
  count: int,
  load: Callable[[], tuple[trained.Trained, dict]],
  text: str,
  limit: int,
  window: int,
) -> dict:
  """Reads the novel with `count` levels learning; a row of the table.

  Args:
    count: of levels that learn.
    load: gives the model and what is said of it.
    text: path of the novel.
    limit: most tokens to read; 0 for all.
    window: tokens attention sees.
  """
  made, said = load()
  tokens = encode(made, text, limit)
  on = read(made, tokens, 'on' if count else 'off', window)
  off = read(made, tokens, 'off', window) if count else on
  rates = language_model.inner_rates(made.model.cfg, made.params)
  return said | {
    'levels': count,
    'periods': list(novel.periods(made.model)),
    'novel': text.rsplit('/', 1)[-1],
    'tokens': on['tokens'],
    'bits_per_byte': on['bits_per_byte'],
    'perplexity': on['perplexity'],
    'frozen_bits_per_byte': off['bits_per_byte'],
    'rates': [float(np.asarray(rate).mean()) for rate in rates],
  }


def encode(
  made: trained.Trained, text: str, limit: int, flag: str = '--novel'
) -> np.ndarray:
  """Ids of the text file of a flag, at most `limit` of them; 0 for all."""
  ids = made.tokenizer.encode(sampling.read_prompt('', text, flag))
  return np.asarray(ids, np.int32)[: limit or None]


def table(rows: list[dict]) -> str:
  """Writes the rows of all cells as Markdown, fewest levels first."""
  rows = sorted(rows, key=lambda row: row['levels'])
  base = next((r['bits_per_byte'] for r in rows if not r['levels']), None)
  head = ['levels', 'periods', 'validation', 'novel', 'less than frozen']
  head += ['same weights frozen', 'perplexity', 'inner rates']
  lines = []
  for row in rows:
    less = None if base is None else 1 - row['bits_per_byte'] / base
    lines.append(
      [
        str(row['levels']),
        ' '.join(map(str, row['periods'])) or '-',
        '-' if 'valid' not in row else f'{row["valid"]:.4f}',
        f'{row["bits_per_byte"]:.4f}',
        '-' if less is None else f'{less:.1%}',
        f'{row["frozen_bits_per_byte"]:.4f}',
        f'{row["perplexity"]:.3f}',
        ' '.join(f'{rate:.3g}' for rate in row['rates']) or '-',
      ]
    )
  words = (
    f'{rows[0]["novel"]}, {rows[0]["tokens"]:,.0f} tokens, read once, bits per '
    f'byte. On {timing.device()}.'
  )
  return f'{words}\n\n{timing.markdown(head, lines)}'


def compare(
  loads: dict[int, Callable], key: dict, text: str, limit: int, window: int, out
) -> str:
  """Goes through the cells that are not there yet; gives the table.

  Args:
    loads: count of levels -> what `cell` takes.
    key: what the cells are results of, beside novel, limit and window.
    text, limit, window: as `cell` takes them.
    out: folder, made if it is not there.
  """
  out = pathlib.Path(out)
  key = key | {'novel': text, 'limit': limit, 'window': window}
  for count, load in loads.items():
    path = out / 'cells' / f'{count}.json'
    if cells.read(path, key | {'levels': count}) is None:
      row = cell(count, load, text, limit, window)
      cells.write(path, key | {'levels': count}, [row])
  paths = sorted((out / 'cells').glob('*.json'))
  words = table([row for path in paths for row in cells.read(path)])
  (out / 'table.md').write_text(words + '\n')
  return words
