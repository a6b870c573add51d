"""Days and nights: `nestax-sleep --workdir=RUN --text='diary/*.txt' ...`.

The model reads, each file as a day (or as an owner, cut into `--days=N`), and
sleeps after each one. Stopped in whatever way, the same command goes on.
`nestax-sleep --forget=NAME --out=DIR` deletes an owner of the life in DIR, and
reads no other flag.

A night moves what each level holds into a new slot of the next slower one, and
what the slowest has written into a slot of its own. An accepted night so uses
up two slots of the slowest level (one of an only level). The fastest uses none;
levels between are emptied and hold one. When a level is full the next night is
refused, and nothing is lost; with --set=night.full=merge its slots are folded
into its MLP first, unless more than night.lost=0.2 of what they say is lost.

The table of a night has a row for each level, which is called by its period:

  goes to      whose new slot took what the level held
  had written  norm of all that it had learned when the model fell asleep
  divergence   from the model that fell asleep to the one that learns by that
               slot, nats a token, at the first update -> at the last
  slots used   by the level that wakes up, of those that it has
  merged       whether its slots were full and folded into its MLP, with the
               share of what they said that was lost

`night.jsonl` (a line a night) has these of each level under `levels`: written,
divergence_first, divergence, used and lost; `lineage.jsonl` (a line a version)
has them in its metrics.

While it goes on: divergence on what the sleeper says, on_policy_divergence on
what the learner says, reward of that, norm of the gradient, and kept, the
divergence on texts that are to stay as they were: near 0 is right.
"""

import sys

from absl import app, flags

from nestax.launch import (
  checkpoint,
  command,
  forgetting,
  nights,
  room,
  sleep_flags,
  sleep_options,
)
from nestax.launch.run import Interrupted

_LESS = (
  'fewer rows of a night (--set=night.seed.rows), shorter texts '
  '(--set=night.texts.length) or a shorter --set=window'
)
# Its own, so that the module can be imported beside the commands.
FLAGS = flags.FlagValues()
flags.DEFINE_string(
  'workdir',
  None,
  'Folder of the run whose model is to live; or give --model.',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'model',
  None,
  'File of a pretrained model to use instead of a run.',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'stack',
  None,
  'How the MLPs of a --model become levels: groups, the default, or copies.',
  flag_values=FLAGS,
)
flags.DEFINE_list(
  'periods',
  None,
  'Tokens between commits of each stacked level of a --model; 32 if none.',
  flag_values=FLAGS,
)
flags.DEFINE_float(
  'rate',
  None,
  'Inner learning rate of the stacked levels of a --model; 0.2 if none.',
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'slots',
  0,
  'Slots to give each level of a model that has none, such as 16.',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'scope',
  'shared',
  "shared (one set of slots for all) or owner (each owner's own).",
  flag_values=FLAGS,
)
flags.DEFINE_list(
  'text',
  None,
  'Files or folders (globs) to read; a folder is a day, its files owners.',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'core',
  None,
  'Text file that the model may not get worse on, the core set.',
  flag_values=FLAGS,
)
flags.DEFINE_list(
  'rehearse',
  [],
  'Texts (globs) of the kind that is to stay known, rehearsed at night.',
  flag_values=FLAGS,
)
flags.DEFINE_string(
  'questions',
  '',
  'File of questions to put before and after each night, a JSON a line.',
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'days',
  0,
  "Days to cut each file into, then an owner's; 0: a file is a day.",
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'nights',
  sleep_options.EVERY_DAY,
  'Most nights in all; -1: no limit.',
  flag_values=FLAGS,
)
flags.DEFINE_integer(
  'sleep_every',
  0,
  'Tokens that are read between two nights; 0: a night after each day.',
  flag_values=FLAGS,
)
flags.DEFINE_list(
  'owners',
  [],
  'Owners whose days are slept on; those of all if not given.',
  flag_values=FLAGS,
)
flags.DEFINE_list(
  'set',
  [],
  'Other options as KEY=VALUE, see launch/sleep_options.py.',
  flag_values=FLAGS,
)
_FORGET = flags.DEFINE_string(
  'forget',
  '',
  'Owner to delete from the life in --out; no night follows.',
  flag_values=FLAGS,
)
_OUT = flags.DEFINE_string(
  'out',
  'runs/nights',
  'Folder of the life: its checkpoints and results.',
  flag_values=FLAGS,
)


def main(argv: list[str]) -> int:
  """Lives; 0, 2 if something asked for cannot be, 128 + signal if stopped."""
  try:
    if len(argv) > 1:
      raise ValueError(f'unexpected argument {argv[1]!r}')
    with room.wanted('the model and its nights', _LESS):
      if _FORGET.value:
        forgetting.forget(_OUT.value, _FORGET.value)
      else:
        nights.live(sleep_flags.plan(FLAGS.flag_values_dict()), _OUT.value)
  except Interrupted as stopped:
    return _refuse(stopped, stopped.exit_code)
  except (
    ValueError, OSError, ImportError, room.OutOfMemory,
    checkpoint.CheckpointError,
  ) as e:  # fmt: skip
    return _refuse(e)
  return 0


def _refuse(error: Exception, code: int = 2) -> int:
  print(f'nestax-sleep: {error}', file=sys.stderr)
  return code


def cli() -> None:
  app.run(main, flags_parser=command.parser('nestax-sleep', __doc__, FLAGS))


if __name__ == '__main__':
  cli()
