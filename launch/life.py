"""What a model that reads and sleeps carries along, in memory and on disk."""

import dataclasses
import functools
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from nestax.launch import checkpoint
from nestax.launch.sleep_options import Options
from nestax.launch.trained import Trained
from nestax.models import model_state
from nestax.sleep.grow import where_owners
from nestax.sleep.replay import Replay

_BUFFERS = ('replay', 'earlier')  # of a `Past`


class Being(NamedTuple):
  """The arrays: slow weights, and the state of every owner."""

  params: Any
  state: model_state.ModelState
  logits_BxV: jax.Array  # for the next token; all equal before the first


@dataclasses.dataclass
class Past:
  """Everything else: where the reading stands, and what there was.

  Attributes:
    owners: of the rows of the state.
    replay: what was read since the last night.
    earlier: what was slept on in the nights before, to be rehearsed.
    step: number of the checkpoint.
    day: number of the day, from 0.
    done: tokens that each owner has read of it.
    since: tokens of the stream since the last night.
    dusk: whether a night is due.
    nights: how many there were.
    forgotten: owners of whom nothing is kept.
    marks: checksums of the days that were begun.
    called: their names, by number; lives that began before have none.
    rows: what `report.night_row` says of each night.
    versions: lines of the lineage; `by_level` names their levels in the files.
  """

  owners: list[str]
  replay: Replay
  earlier: Replay = dataclasses.field(default_factory=lambda: Replay(1))
  step: int = 0
  day: int = 0
  done: dict[str, int] = dataclasses.field(default_factory=dict)
  since: int = 0
  dusk: bool = False
  nights: int = 0
  forgotten: list[str] = dataclasses.field(default_factory=list)
  marks: list[dict[str, int]] = dataclasses.field(default_factory=list)
  called: dict[str, str] = dataclasses.field(default_factory=dict)
  rows: list[dict] = dataclasses.field(default_factory=list)
  versions: list[dict] = dataclasses.field(default_factory=list)

  def get_state(self) -> bytes:
    """What a checkpoint holds of it."""
    buffers = {name: getattr(self, name).rows() for name in _BUFFERS}
    return json.dumps(vars(self) | buffers).encode()

  def set_state(self, state: dict) -> None:
    """Takes over what a checkpoint held."""
    # lives that began before there was an `earlier` have none
    held = {x: Replay.of_rows(state[x]) for x in _BUFFERS if x in state}
    vars(self).update(state | held)

  @property
  def names(self) -> list[str]:
    """The owners by their rows; '' for who was forgotten: rows stay."""
    return [name if name in self.present else '' for name in self.owners]

  @property
  def present(self) -> list[str]:
    """The owners who were not forgotten."""
    return [name for name in self.owners if name not in self.forgotten]


def owners(out) -> list[str] | None:
  """Those of the life in a folder, whom its files may not name any more.

  None: there is no life there, or none that can be read.
  """
  try:
    found = newest(out)
  except (FileNotFoundError, checkpoint.CheckpointError):
    return None
  return found and found.position()['owners']


def newest(out) -> checkpoint.Found | None:
  """Config and position of a folder's newest checkpoint; None: of no life.

  Raises:
    FileNotFoundError, checkpoint.CheckpointError: as `checkpoint.load_parts`.
  """
  found = checkpoint.load_parts(out, lambda *_: {}, lambda line: None)
  return found if 'life' in found.config else None


class Store:
  """The checkpoints of a life, each complete or absent."""

  def __init__(self, out, made: Trained, options: Options, say):
    """Opens `out/checkpoints`.

    Args:
      out: folder of the life.
      made: a life goes on with the kind of model that it began with.
      options: gives the window, which has to stay, and how many to keep.
      say: what to tell the user, a line at a time.
    """
    words = made.words
    if words != 'bytes' and os.path.isfile(words):
      words = os.path.abspath(words)
    # in the groups of a run's config, so that other commands load the model
    config = {
      'model': dataclasses.asdict(made.model.cfg),
      'data': {'tokenizer': words},
      'life': {'window': options.window},
      'checkpoint': {'keep': options.keep or None},
    }
    config = ml_collections.ConfigDict(config)
    self._checkpoints = checkpoint.Checkpoints(out, config, say, flag='out')

  def save(self, being: Being, past: Past) -> None:
    """Writes the next checkpoint; all of it is on the disk on return."""
    past.step += 1
    self._checkpoints.save(past.step, being, past)
    self._checkpoints.wait()

  def restore(self, like: Being, past: Past) -> Being | None:
    """Reads the newest one, and sets the past; None if there is none."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), like
    )
    return self._checkpoints.restore(abstract, past)

  def forget_others(self, step: int) -> None:
    """Deletes every checkpoint but one, damaged ones too."""
    self._checkpoints.keep_only(step)

  def close(self) -> None:
    self._checkpoints.close()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def read(model, params, state, logits_BxV, tokens_BxL, reads_B):
  """Reads on, in the active phase.

  Args:
    model: the model.
    params: its slow weights.
    state: of all owners; used up, as are the logits.
    logits_BxV: for the first of the tokens.
    tokens_BxL: int32.
    reads_B: bool; the others stay as they are to the bit.

  Returns:
    (state, logits of the next token, what each token cost, nats `[B, L]`).
  """
  new, logits_BxLxV = model.apply({'params': params}, state, tokens_BxL)
  last_BxV = jnp.where(reads_B[:, None], logits_BxLxV[:, -1], logits_BxV)
  before = jnp.concatenate([logits_BxV[:, None], logits_BxLxV[:, :-1]], 1)
  logs = jax.nn.log_softmax(before)
  nats_BxL = -jnp.take_along_axis(logs, tokens_BxL[..., None], -1)[..., 0]
  return where_owners(reads_B, new, state), last_BxV, nats_BxL
