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


_WORKDIR = _flag(flags.DEFINE_string, 'workdir', 'runs/nights', 'Results.')
_MODEL = _flag(flags.DEFINE_string, 'model', '', 'Pretrained file.')
_CORE = _flag(flags.DEFINE_string, 'core', '', 'Text that stays known.')
_REHEARSE = _flag(
  flags.DEFINE_list, 'rehearse', [], 'More texts, to be rehearsed at night.'
)
_OTHER = _flag(
  flags.DEFINE_string, 'other', '', 'Text of a kind that is not rehearsed.'
)
_METHODS = _flag(
  flags.DEFINE_list,
  'methods',
  ['sleep', 'no expansion', 'fine-tuning', 'fine-tuning; replay', 'no sleep'],
  f'Of {"; ".join(sleepers.NAMES)}; all. A comma in a name is written ;',
)
_SEEDS = _flag(flags.DEFINE_list, 'seeds', ['0', '1', '2'], 'Of the facts.')
_DAYS = _flag(flags.DEFINE_integer, 'days', 5, 'Nights.', lower_bound=1)
_SET = _flag(
  flags.DEFINE_multi_string,
  'set',
  [],
  'Another value, such as --set=passes=8, --set=seed.steps=400.',
)
_REPORT = _flag(flags.DEFINE_bool, 'report', True, 'Write the report.')


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


if __name__ == '__main__':
  parse = command.parser('nights', __doc__, FLAGS)
  app.run(main, flags_parser=parse)
