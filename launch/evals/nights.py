"""Five days and nights: `python -m nestax.launch.evals.nights --workdir=W`.

Every day a stream teaches facts about people who do not exist, each of them in
several wordings, read several times; they are asked in other words, alone,
with no text in context: before the night, by what the levels have written, and
in the morning, with the levels reset. Beside sleep: no sleep, fine-tuning on
the same texts with as many updates, the same with replay, distillation without
growth; and sleep without one part each. `--model=FILE.gguf` takes a pretrained
model; without, one is made in two minutes that knows other people.

A cell is one way to spend the nights, with one seed; cells that are there are
not lived again, nor those that another process lives: the same command in many
processes shares the work. The report goes to `table.md`, `rows.jsonl`,
`nights.png`.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
from absl import app, flags

from nestax.launch import command, lock
from nestax.launch.evals import cells, lives, retention, sleepers

# Its own, so that the module can be imported beside the commands.
FLAGS = flags.FlagValues()


def _flag(define, name, default, words, **options):
  return define(name, default, words, flag_values=FLAGS, **options)


_WORKDIR = _flag(
  flags.DEFINE_string, 'workdir', 'runs/nights',
  'Folder for the cells, the table and the plot.',
)  # fmt: skip
_MODEL = _flag(
  flags.DEFINE_string, 'model', '',
  'File of a pretrained model; without, a small one is made.',
)  # fmt: skip
_CORE = _flag(
  flags.DEFINE_string, 'core', '',
  'Text file that a --model is to go on knowing.',
)  # fmt: skip
_REHEARSE = _flag(
  flags.DEFINE_list, 'rehearse', [],
  'Text files of the same kind, some of which are rehearsed every night.',
)  # fmt: skip
_OTHER = _flag(
  flags.DEFINE_string, 'other', '',
  'Text file of another kind, not rehearsed, to see what is lost of it.',
)  # fmt: skip
_METHODS = _flag(
  flags.DEFINE_list,
  'methods',
  ['sleep', 'no expansion', 'fine-tuning', 'fine-tuning; replay', 'no sleep'],
  'Ways to spend the nights, see above; all for all of them.',
)
_SEEDS = _flag(
  flags.DEFINE_list, 'seeds', ['0', '1', '2'],
  'Seeds of the facts, each a row of days of its own.',
)  # fmt: skip
_DAYS = _flag(
  flags.DEFINE_integer, 'days', 5,
  'Days of each cell, with a night after each.', lower_bound=1,
)  # fmt: skip
_SET = _flag(
  flags.DEFINE_multi_string,
  'set',
  [],
  'Another value of the setting, such as --set=passes=8 or seed.steps=400.',
)
_REPORT = _flag(
  flags.DEFINE_bool, 'report', True,
  'Write the report of all cells that are there.',
)  # fmt: skip


def methods(words: list[str]) -> list[str]:
  """The names asked for.

  Raises:
    ValueError: for one that there is not.
  """
  if words == ['all']:
    return list(sleepers.NAMES)
  names = [word.strip().replace(';', ',') for word in words]
  for name in names:
    if name not in sleepers.NAMES:
      raise ValueError(f'{name!r}: one of {"; ".join(sleepers.NAMES)}')
  return names


def run(
  world: lives.World,
  setting: lives.Setting,
  names: list[str],
  seeds: list[int],
  days: int,
  folder: pathlib.Path,
) -> None:
  """Lives all cells that are not there yet, nor lived by another process."""
  (folder / 'cells').mkdir(parents=True, exist_ok=True)
  for name in names:
    sleeper = None
    for seed in seeds:
      key = {'method': name, 'seed': seed, 'days': days}
      key |= {'model': world.name, 'setting': dataclasses.asdict(setting)}
      key |= {'texts': world.texts}
      key |= {'device': jax.devices()[0].device_kind}
      key = json.loads(json.dumps(key))  # tuples come back as lists
      slug = name.replace(',', '').replace(' ', '-')
      path = folder / 'cells' / f'{slug}-{days}-{seed}.json'
      with lock.free(path.with_suffix('.lock')) as mine:
        if not mine or cells.read(path, key) is not None:
          continue
        if sleeper is None:
          sleeper = sleepers.make(
            name, world.cfg, setting.how, world.words, setting.tuning_rate
          )
        start, said = time.perf_counter(), _say(name, seed)
        rows = lives.live(world, setting, sleeper, seed, days, said)
        rows = [{'method': name, 'seed': seed} | row for row in rows]
        cells.write(path, key, rows)
        spent = time.perf_counter() - start
        print(f'{name}, seed {seed}: {spent:.0f} s', flush=True)


def _say(name: str, seed: int):
  def say(row: dict) -> None:
    dreams = {
      key: value
      for key, value in row.get('numbers', {}).items()
      if key.startswith('dream_')
    }
    plain = {
      key: round(value, 3) if isinstance(value, float) else value
      for key, value in (row | dreams).items()
      if key not in ('numbers', 'seconds')
    }
    spent = ', '.join(f'{k} {v:.1f} s' for k, v in row['seconds'].items())
    print(f'{name}, seed {seed}: {plain}; {spent}', flush=True)

  return say


def main(argv: list[str]) -> int:
  """Lives and reports; returns 0, or 2 for what cannot be done."""
  folder = pathlib.Path(_WORKDIR.value)
  try:
    if argv[1:]:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    names, seeds = methods(_METHODS.value), [int(x) for x in _SEEDS.value]
    setting = lives.setting(_MODEL.value, _SET.value)
    if names:
      world = lives.world(
        setting,
        folder,
        _MODEL.value,
        _CORE.value,
        _REHEARSE.value,
        _OTHER.value,
      )
      run(world, setting, names, seeds, _DAYS.value, folder)
    if _REPORT.value:
      print(retention.write(folder))
  except (ValueError, OSError) as error:
    print(f'nights: {error}', file=sys.stderr)
    return 2
  return 0


def cli() -> None:
  ways = '\n'.join(f'  {name.replace(",", ";")}' for name in sleepers.NAMES)
  words = f'{__doc__}\nWays to spend the nights, for --methods:\n{ways}\n'
  parse = command.parser('nights', words, FLAGS)
  app.run(main, flags_parser=parse)


if __name__ == '__main__':
  cli()
