"""Deletes an owner of a life: the state, what was read, old checkpoints.

Of the life's own folder, without its model or its texts.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nestax.launch import checkpoint, life, lock
from nestax.launch.life import Being, Past
from nestax.launch.signals import Signals
from nestax.launch.sleep_options import Options
from nestax.launch.trained import Trained
from nestax.models import language_model, model_state
from nestax.models.config import ModelConfig
from nestax.sleep.replay import Replay


def forget(out, name: str) -> None:
  """Leaves one checkpoint, that holds nothing the owner `name` read or learned.

  What stays is the name, whose row is kept free, and what nights have said:
  figures, and with slots of their own each owner's words of the gate.

  Raises:
    ValueError: if there is no life in `out`, or no such owner in it.
    checkpoint.CheckpointError: if checkpoints cannot be written or read.
    lock.InUse: if somebody lives in `out`.
  """
  out = pathlib.Path(out)
  no_life = ValueError(
    f'--out={out}: no life of nestax-sleep to delete {name!r} of is there; '
    'give the --out of the life'
  )
  if not (out / 'checkpoints').is_dir():
    raise no_life
  checkpoint.check_writable(out, 'out')
  with lock.held(out, flag='out'), Signals():
    found = life.newest(out)
    if found is None:
      raise no_life
    _forget(out, found.config, found.position()['owners'], name)


def _forget(out, config: dict, owners: Sequence[str], name: str) -> None:
  cfg = ModelConfig.from_dict(config['model'])
  model = language_model.LanguageModel(cfg)
  made = Trained(model, {}, None, 0, config['data']['tokenizer'])
  options = Options(
    window=config['life']['window'], keep=config['checkpoint']['keep'] or 0
  )
  store = life.Store(out, made, options, functools.partial(print, flush=True))
  try:
    past = Past([], Replay(2))
    init = functools.partial(
      model_state.init_state, cfg, len(owners), options.window
    )
    being = store.restore(_shapes(cfg, init), past)
    if name in past.forgotten:  # perhaps cut off before its end
      store.forget_others(past.step)
    if name not in past.present:
      there = ', '.join(past.present) or 'none'
      raise ValueError(
        f'--forget={name}: there is no such owner in {out}; there are {there}'
      )
    being = _without(being, init(), past, name)
    store.save(being, past)
    store.forget_others(past.step)
  finally:
    store.close()
  print(_words(name, apart=being.state.owned is not None), flush=True)


def _shapes(cfg: ModelConfig, init: Callable) -> Being:
  """The being of a life, without arrays."""
  state = jax.eval_shape(init)
  B = state.levels.clock_B.shape[0]
  logits = jax.ShapeDtypeStruct((B, cfg.V), jnp.float32)
  return Being(nn.unbox(language_model.abstract_params(cfg)), state, logits)


def _without(being: Being, fresh, past: Past, name: str) -> Being:
  """Deletes the owner from the past, and gives the being without them."""
  mask_B = np.array([x == name for x in past.owners])
  past.replay.delete(name)
  past.earlier.delete(name)
  past.forgotten.append(name)
  past.done.pop(name, None)
  for marks in past.marks:
    marks.pop(name, None)
  return being._replace(
    state=life.where_owners(mask_B, fresh, being.state),
    logits_BxV=jnp.where(mask_B[:, None], 0.0, being.logits_BxV),
  )


def _words(name: str, apart: bool) -> str:
  words = (
    f"{name}'s state and replay buffer are deleted, and the checkpoints that "
    'held them.'
  )
  if apart:
    return words
  return (
    f'{words} What nights before have moved into slots, which all owners '
    'share, stays there'
  )
