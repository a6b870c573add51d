"""A model is asked: how likely it finds answers that are given.

Levels are held as they are while it is asked. Prompts that are equal are read
once and their answers go on from copies of the state; rows and lengths come in
few sizes, so that there are few programs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nestax.models import language_model, model_state
from nestax.models.config import ModelConfig
from nestax.sleep import distributions
from nestax.sleep import reader as readers
from nestax.sleep.reader import Rows

AT_ONCE = 4096  # tokens a call at most: their logits have to fit into memory

Tokens = Sequence[int]


class Score(NamedTuple):
  """How a model likes an answer."""

  log: float  # log-probability of its tokens together, nats
  greedy: bool  # whether each of them is the likeliest


@dataclasses.dataclass(frozen=True)
class Asked:
  """A model that is asked.

  Attributes:
    cfg: the model.
    params: its parameters.
    rows: prompts, or answers, at a time.
    begun: state of one row that every prompt goes on from, see `go_on`; its
      attention must have room for prompt and answer. None for fresh rows.
    context: what levels have written, of one owner, for fresh rows.
  """

  cfg: ModelConfig
  params: Any
  rows: int = 8
  begun: Rows | None = None
  context: Any = None

  def __post_init__(self):
    if self.rows < 1:
      raise ValueError(f'rows={self.rows}: at least 1')

  def start(self, length: int) -> Rows:
    """State of all rows before their prompts, with room for `length` tokens."""
    if self.begun is not None:
      return _fork(self.begun, np.zeros(self.rows, np.int32))
    return readers.of_model(self.cfg).fresh(self.context, self.rows, length)


def go_on(state: model_state.ModelState) -> Rows:
  """A stream's state as one to ask from, levels as they are by now."""
  return Rows(state.blocks, readers.learned(state))


def size(length: int) -> int:
  """The least of 1, 8, 16, 32, 48, 64, 96, 128, ... that is no less."""
  if length <= 1:
    return 1
  whole = max(8, 1 << (length - 1).bit_length())
  half = whole * 3 // 4
  return half if half >= max(length, 48) else whole


def _room(length: int) -> int:
  """128, 512, 2,048, ... tokens: every other size of a state is a program."""
  most = 128
  while most < length:
    most *= 4
  return most


def _fork(state: Rows, index_B) -> Rows:
  """Copies of rows; what levels have written is one owner's, and shared."""
  index_B = jnp.asarray(index_B)
  return state._replace(mixers=jax.tree.map(lambda x: x[:, index_B], state[0]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def _read(cfg, params, written, mixers, last_BxV, tokens_BxL, length_B):
  """Reads; `last_BxV` are the logits after each row's last token so far."""
  state, logits_BxLxV = readers.of_model(cfg).read(
    params, Rows(mixers, written), tokens_BxL, length_B
  )
  end_Bx1x1 = jnp.maximum(length_B - 1, 0)[:, None, None]
  here_BxV = jnp.take_along_axis(logits_BxLxV, end_Bx1x1, 1)[:, 0]
  last_BxV = jnp.where(length_B[:, None] > 0, here_BxV, last_BxV)
  return state.mixers, last_BxV


@functools.partial(jax.jit, static_argnums=0)
def _score(cfg, params, state: Rows, last_BxV, index_R, tokens_RxL, length_R):
  """Scores answers; row r goes on from row `index_R[r]` of the prompts."""
  logits_RxLxV = last_BxV[index_R][:, None]
  if tokens_RxL.shape[1] > 1:
    read = readers.of_model(cfg).read
    length = jnp.maximum(length_R - 1, 0)
    rest = read(params, _fork(state, index_R), tokens_RxL[:, :-1], length)[1]
    logits_RxLxV = jnp.concatenate([logits_RxLxV, rest], 1)
  return _judge(logits_RxLxV, tokens_RxL, length_R)


def _judge(logits_RxLxV, tokens_RxL, length_R, start_R=None):
  place_1xL = jnp.arange(tokens_RxL.shape[1])[None]
  mask_RxL = place_1xL < length_R[:, None]
  if start_R is not None:
    mask_RxL &= place_1xL >= start_R[:, None]
  log_R = distributions.log_chance(logits_RxLxV, tokens_RxL, mask_RxL)
  same_RxL = logits_RxLxV.argmax(-1) == tokens_RxL
  return log_R, (same_RxL | ~mask_RxL).all(1)


def padded(rows: Sequence[Tokens], count: int, width: int):
  """Gives `(tokens, lengths)`, numpy int32; rows past the last are empty."""
  tokens = np.zeros((count, width), np.int32)
  length = np.zeros(count, np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
    length[i] = len(row)
  return tokens, length


def read_prompts(asked: Asked, prompts: Sequence[Tokens], room: int):
  """Reads at most `asked.rows` prompts; gives state and last logits.

  Rows past the last prompt are empty; there is room for `room` tokens more.
  """
  width = size(max(map(len, prompts)))
  piece = min(width, max(1, AT_ONCE // asked.rows))
  width = -(-width // piece) * piece
  tokens, length = padded(prompts, asked.rows, width)
  state = asked.start(_room(width + room))
  last = jnp.zeros((asked.rows, asked.cfg.V), jnp.float32)
  for at in range(0, width, piece):
    here = np.clip(length - at, 0, piece)
    part = tokens[:, at : at + piece]
    mixers, last = _read(
      asked.cfg, asked.params, state.written, state.mixers, last, part, here
    )
    state = state._replace(mixers=mixers)
  return state, last


def check(prompts: Sequence[Tokens]) -> None:
  """Raises ValueError naming the first prompt that is empty."""
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(f'prompt {i} is empty: nothing to go on from')


def score(
  asked: Asked,
  pairs: Sequence[tuple[Tokens, Tokens]],
  show: Callable[[int], None] = lambda done: None,
) -> list[Score]:
  """Scores answers, each after its prompt.

  Args:
    asked: the model.
    pairs: ids of prompt and answer; prompts are not empty, an answer without
      tokens has log-probability 0.
    show: called with how many more have been scored.

  Raises:
    ValueError: naming the first pair whose prompt is empty.
  """
  check([prompt for prompt, _ in pairs])
  answers: dict[tuple, list[int]] = {}
  for i, (prompt, _) in enumerate(pairs):
    answers.setdefault(tuple(prompt), []).append(i)
  room = size(max((len(answer) for _, answer in pairs), default=1))
  prompts = sorted(answers, key=len, reverse=True)
  scores: list[Score | None] = [None] * len(pairs)
  for at in range(0, len(prompts), asked.rows):
    batch = prompts[at : at + asked.rows]
    state, last = read_prompts(asked, batch, room)
    todo = [(row, i) for row, p in enumerate(batch) for i in answers[p]]
    todo.sort(key=lambda pair: len(pairs[pair[1]][1]))
    for first in range(0, len(todo), asked.rows):
      part = todo[first : first + asked.rows]
      rows = [pairs[i][1] for _, i in part]
      tokens, length = padded(rows, asked.rows, size(max(map(len, rows))))
      index = np.zeros(asked.rows, np.int32)
      index[: len(part)] = [row for row, _ in part]
      found = _score(
        asked.cfg, asked.params, state, last, index, tokens, length
      )
      logs, greedy = jax.device_get(found)
      for (_, i), log, same in zip(part, logs, greedy):
        scores[i] = Score(float(log), bool(same))
      show(len(part))
  return scores


@functools.partial(jax.jit, static_argnums=0)
def _score_whole(cfg, params, tokens_RxL, start_R, length_R):
  model = language_model.LanguageModel(cfg)
  _, logits = model.apply({'params': params}, None, tokens_RxL)
  start, length = start_R - 1, length_R - 1
  return _judge(logits[:, :-1], tokens_RxL[:, 1:], length, start)


def score_learning(
  cfg: ModelConfig,
  params,
  pairs: Sequence[tuple[Tokens, Tokens]],
  rows: int = 8,
  show: Callable[[int], None] = lambda done: None,
) -> list[Score]:
  """`score`, the levels learning from prompt and answer as they are read.

  Each prompt is read anew for each of its answers.
  """
  check([prompt for prompt, _ in pairs])
  whole = [[*prompt, *answer] for prompt, answer in pairs]
  order = sorted(range(len(pairs)), key=lambda i: -len(whole[i]))
  scores: list[Score | None] = [None] * len(pairs)
  while order:
    width = size(len(whole[order[0]]))
    count = max(1, min(rows, AT_ONCE // width))
    batch, order = order[:count], order[count:]
    tokens, length = padded([whole[i] for i in batch], count, width)
    start = np.ones(count, np.int32)
    start[: len(batch)] = [len(pairs[i][0]) for i in batch]
    found = _score_whole(cfg, params, tokens, start, length)
    for i, log, same in zip(batch, *jax.device_get(found)):
      scores[i] = Score(float(log), bool(same))
    show(len(batch))
  return scores
