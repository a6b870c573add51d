"""The life that a command line of `nestax-sleep` asks for."""

import dataclasses
import glob
from collections.abc import Mapping

from nestax.launch import days, overrides, plans
from nestax.launch.evals import novel
from nestax.launch.plans import Plan
from nestax.launch.sleep_options import PRETRAINED, Options
from nestax.models.continuum import SCOPES
from nestax.sleep import tasks

# Of what was measured with SmolLM2-135M what comes to recall: slower levels, or
# a window in which attention still sees a fact's other statements, write too
# little.
STACK = {'stack': 'groups', 'periods': ('32',), 'rate': 0.2}


def plan(values: Mapping) -> Plan:
  """The plan of a command line; `values` are its flags by name.

  Raises:
    ValueError, OSError, ImportError, checkpoint.CheckpointError: in words.
  """
  model = values['model']
  for name, what in (
    ('text', 'files or folders, of what the model reads'),
    ('core', 'a file, of what it may not get worse on'),
  ):
    if not values[name]:
      raise ValueError(f'--{name} is missing: give {what}')
  options = PRETRAINED if model else Options()
  every = values['sleep_every']
  options = dataclasses.replace(
    options,
    readings=1 if every else options.readings,
    nights=values['nights'],
    sleep_every=every,
  )
  options = overrides.apply(options, values['set'])
  made = novel.load(values['workdir'], model, _stack(values))
  if values['scope'] not in SCOPES:
    raise ValueError(f'--scope={values["scope"]}: one of {", ".join(SCOPES)}')
  if values['slots']:
    made = plans.equipped(made, values['slots'], options, values['scope'])
  elif values['scope'] == 'owner' != made.model.cfg.cms.scope:
    raise ValueError(
      '--scope=owner is for slots that --slots=N gives; those of this model '
      'are shared'
    )
  elif not made.model.cfg.cms.slots:
    raise ValueError(
      'the levels of this model have no slots to grow into; give them some, '
      'such as --slots=16: an accepted night uses up two of the slowest level '
      '(one of an only level), so that 16 are for 8 nights; the next is '
      'refused, or with --set=night.full=merge folds them into the MLP first'
    )
  tokenizer = made.tokenizer
  paths = sorted(glob.glob(options.arc)) if options.arc else []
  if options.arc and not paths:
    raise FileNotFoundError(f'arc={options.arc}: there is no such file')
  # their parts go on from each other
  encode = tokenizer.encode_after
  arc = [tasks.arc(path, encode, tokenizer.bos) for path in paths]
  read = days.load(values['text'], values['days'], tokenizer)
  return plans.prepare(
    made,
    read,
    values['core'],
    options,
    values['owners'],
    arc,
    values['rehearse'],
    asked=values['questions'],
  )


def _stack(values: Mapping) -> novel.Stack:
  """How a pretrained model's MLPs become levels; nothing for a run's model."""
  given = {name: values[name] for name in STACK if values[name] is not None}
  if values['workdir'] and not values['model']:
    for name in given:
      raise ValueError(
        f'--{name} is for the levels that a pretrained --model is given; those '
        'of a run are as they were trained'
      )
    return novel.Stack('', (), 'all', 0.0)
  how, periods, rate = (STACK | given).values()
  return novel.Stack(how, tuple(periods), 'all', rate)
